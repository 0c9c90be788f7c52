"""Certificates renewed while services run: taken up by both ends, and not if they are of no use."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import pytest

from protos.rpc.channel import open_channel, wait_serving
from protos.rpc.errors import StartupError, UnavailableError
from protos.rpc.security import Security, read_security
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.certificates import Certificates, make_certificates
from tests.fakes import FakeWorker, serving, worker_service


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path)


def mutual(files: Certificates) -> Security:
    return read_security(files.certificate, files.key, files.authority, is_mutual=True)


def shown_by(address: str) -> str:
    """The certificate that a new connection is met with."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10).strip()


async def check_load(stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
    answer = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    assert answer.num_kv_blocks == 64


async def test_new_connections_are_met_with_the_renewed_certificate(files: Certificates) -> None:
    security = read_security(files.certificate, files.key, None, is_mutual=False)
    async with serving(worker_service(FakeWorker()), security=security) as address:
        before = await asyncio.to_thread(shown_by, address)
        assert before in files.certificate.read_text()
        files.sign()
        after = await asyncio.to_thread(shown_by, address)
    assert after != before
    assert after in files.certificate.read_text()


async def test_a_broken_file_leaves_the_old_certificate_in_use_and_is_told_once(
    files: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    security = read_security(files.certificate, files.key, None, is_mutual=False)
    async with serving(worker_service(FakeWorker()), security=security) as address:
        before = await asyncio.to_thread(shown_by, address)
        files.certificate.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert await asyncio.to_thread(shown_by, address) == before
        files.sign()
        assert await asyncio.to_thread(shown_by, address) != before
    [told] = [record.message for record in caplog.records if record.name == "protos.rpc.renewal"]
    assert str(files.certificate) in told
    assert "what was read before stays in use" in told


async def test_both_ends_of_mutual_tls_take_up_a_new_authority(files: Certificates) -> None:
    security = mutual(files)
    async with (
        serving(worker_service(FakeWorker()), security=security) as address,
        open_channel(address, security) as channel,
    ):
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        await check_load(stub)
        old = read_files(files)
        files.found()
        files.sign()
        await check_load(stub)
        async with open_channel(address, old) as stranger:
            with pytest.raises(UnavailableError):
                await wait_serving(stranger, timeout_seconds=1)
        async with open_channel(address, mutual(files)) as other:
            await check_load(worker_pb2_grpc.WorkerServiceStub(other))


async def test_calls_that_run_outlive_a_renewal(files: Certificates) -> None:
    worker = FakeWorker(completion=[100] * 5, delay_seconds=0.05)
    security = mutual(files)
    async with (
        serving(worker_service(worker), security=security) as address,
        open_channel(address, security) as channel,
    ):
        call = worker_pb2_grpc.WorkerServiceStub(channel).Generate(worker_pb2.GenerateRequest(), timeout=20)
        kinds = []
        async for response in call:
            kinds.append(response.WhichOneof("event"))
            files.sign()
            await check_load(worker_pb2_grpc.WorkerServiceStub(channel))
    assert kinds[-1] == "finish"


def test_a_key_of_another_certificate_is_refused_at_the_start(files: Certificates, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_certificates(tmp_path / "other")
    with pytest.raises(StartupError, match="key values mismatch"):
        read_security(files.certificate, other.key, None, is_mutual=False)


def read_files(files: Certificates) -> Security:
    """What they hold now, for good."""
    held = files.certificate.read_bytes(), files.key.read_bytes(), files.authority.read_bytes()
    return Security(*held, is_mutual=True)
