"""TLS, mutual TLS and authentication, with certificates made on the spot."""

from __future__ import annotations

import grpc
import pytest

from protos.rpc.channel import open_channel, wait_serving
from protos.rpc.errors import StartupError, UnauthenticatedError, UnavailableError, from_rpc_error
from protos.rpc.security import Security, read_security
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.certificates import make_certificates
from tests.fakes import FakeWorker, serving, worker_service


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = make_certificates(tmp_path_factory.mktemp("tls"))
    return made.authority, made.certificate, made.key


async def load(address, security):
    async with open_channel(address, security) as channel:
        await wait_serving(channel, timeout_seconds=1)
        return await worker_pb2_grpc.WorkerServiceStub(channel).GetLoad(worker_pb2.GetLoadRequest())


async def test_tls_serves_who_trusts_the_authority(files):
    ca, cert, key = files
    service = worker_service(FakeWorker())
    async with serving(service, security=read_security(cert, key, None, is_mutual=False)) as address:
        assert (await load(address, read_security(None, None, ca, is_mutual=False))).num_kv_blocks == 64
        with pytest.raises(UnavailableError):
            await load(address, Security())


async def test_mutual_tls_asks_callers_for_a_certificate(files):
    ca, cert, key = files
    everything = read_security(cert, key, ca, is_mutual=True)
    async with serving(worker_service(FakeWorker()), security=everything) as address:
        assert (await load(address, everything)).num_kv_blocks == 64
        with pytest.raises(UnavailableError):
            await load(address, read_security(None, None, ca, is_mutual=False))


def test_wrong_files_are_named(files, tmp_path):
    ca, cert, _ = files
    (tmp_path / "no.pem").write_text("hello")
    for arguments, words in [
        ((cert, None, None), "--tls-cert and --tls-key go together"),
        ((cert, tmp_path / "absent", None), "--tls-key: cannot read .*absent: no such file"),
        ((None, None, tmp_path / "no.pem"), "--tls-ca: .*no.pem is not a PEM file"),
    ]:
        with pytest.raises(StartupError, match=words):
            read_security(*arguments, is_mutual=False)
    with pytest.raises(StartupError, match="--tls-client-auth needs"):
        read_security(None, None, ca, is_mutual=True)


async def test_calls_without_the_key_are_refused_and_health_is_not():
    def authenticate(method, metadata):
        if metadata.get("authorization") != "Bearer k":
            raise UnauthenticatedError("wrong key")

    service = worker_service(FakeWorker())
    async with serving(service, authenticate=authenticate) as address, open_channel(address) as channel:
        await wait_serving(channel, timeout_seconds=5)
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetLoad(worker_pb2.GetLoadRequest())
        assert isinstance(from_rpc_error(caught.value), UnauthenticatedError)
        await stub.GetLoad(worker_pb2.GetLoadRequest(), metadata=[("authorization", "Bearer k")])
