"""Mutual TLS between the gateway and all behind it, HTTPS in front of it, over ports and unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest

from gateway.http_server import read_http_tls
from gateway.settings import GatewaySettings
from gateway.stack import Gateway, running
from protos.rpc.channel import open_channel
from protos.rpc.errors import StartupError
from protos.rpc.security import Security
from protos.wint2.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from tests.certificates import Certificates, make_certificates
from tests.fakes import FakeTokenizer, FakeWorker, serving, tokenizer_service, worker_service
from tests.gateway.harness import registered, stack, until


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def flags(files: Certificates) -> dict[str, object]:
    mutual = {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.authority}
    https = {"http_tls_cert": files.certificate, "http_tls_key": files.key}
    return {**mutual, "tls_client_auth": True, **https}


@contextlib.asynccontextmanager
async def secured(files: Certificates, sockets: list[str]) -> AsyncIterator[tuple[Gateway, Security]]:
    """A ready gateway, its tokenizer and its worker, each of which asks for a certificate."""
    tokenizer_address, worker_address, gateway_address = sockets
    settings = {"http_host": "127.0.0.1", "http_port": 0, "listen": gateway_address, **flags(files)}
    security = GatewaySettings(tokenizer="x", **settings).read_security()
    tokenizer, worker = tokenizer_service(FakeTokenizer()), worker_service(FakeWorker())
    async with (
        serving(tokenizer, listen=tokenizer_address, security=security) as address,
        running(GatewaySettings(tokenizer=address, **settings)) as gateway,
        serving(worker, listen=worker_address, security=security) as address,
        registered(gateway.grpc_address, address, security=security),
    ):
        await until(lambda: not gateway.readiness.reasons)
        yield gateway, security


@pytest.mark.parametrize("is_unix", [False, True])
async def test_a_request_passes_every_hop(files: Certificates, tmp_path: Path, is_unix: bool) -> None:
    paths = [f"unix:{tmp_path}/{name}" for name in ("tokenizer", "worker", "gateway")]
    sockets = paths if is_unix else ["127.0.0.1:0"] * 3
    trusting = ssl.create_default_context(cafile=str(files.authority))
    async with secured(files, sockets) as (gateway, security):
        url = f"https://localhost:{gateway.http_port}"
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            answer = await http.post("/v1/completions", json={"prompt": "hi"})
            assert answer.json()["choices"][0]["text"] == "hi"
        async with open_channel(gateway.grpc_address, security) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            [model] = (await stub.ListModels(gateway_pb2.ListModelsRequest())).models
            assert model.id == "fake"
        stranger = Security(authority=security.authority)
        async with open_channel(gateway.grpc_address, stranger) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=2)


async def test_https_takes_up_a_renewed_certificate_and_keeps_the_old_one_for_a_broken_file(
    tmp_path: Path,
) -> None:
    files = make_certificates(tmp_path)
    https = {"http_tls_cert": files.certificate, "http_tls_key": files.key}
    async with stack(**https) as made:
        address = ("127.0.0.1", made.gateway.http_port)
        shown = partial(asyncio.to_thread, ssl.get_server_certificate, address, timeout=10)
        before = await shown()
        files.sign()
        renewed = await shown()
        assert renewed != before
        assert renewed.strip() in files.certificate.read_text()
        files.key.write_text("no key")
        assert await shown() == renewed


def test_wrong_http_files_are_named(files: Certificates, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="go together"):
        read_http_tls(files.certificate, None)
    (tmp_path / "key").write_text("no key")
    with pytest.raises(StartupError, match="--http-tls-cert"):
        read_http_tls(files.certificate, tmp_path / "key")
    with pytest.raises(StartupError, match="absent"):
        read_http_tls(tmp_path / "absent", files.key)
