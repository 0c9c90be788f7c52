"""Workers that are named to the scheduler instead of registering with it: asked how they fare."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rpc.channel import open_channel
from protos.rpc.registration import registration
from protos.rpc.security import PLAINTEXT, Security
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

DNS = "dns:"
RESOLVE_SECONDS = 5.0
TIMEOUT_SECONDS = 1.0


@dataclass
class _Link:
    channel: grpc.aio.Channel
    registration: pb.WorkerRegistration | None = None


class StaticWorkers:
    """`targets` are addresses, or "dns:HOST:PORT" for every address that the name has at the time."""

    def __init__(self, targets: Sequence[str], security: Security = PLAINTEXT) -> None:
        self._targets = targets
        self._security = security
        self._links: dict[str, _Link] = {}
        self._addresses: set[str] = set()
        self._resolved_at = -RESOLVE_SECONDS

    async def list_workers(self) -> list[pb.Worker]:
        """Those that answer, as if they had registered."""
        if time.monotonic() - self._resolved_at >= RESOLVE_SECONDS:
            self._addresses = await resolve(self._targets)
            self._resolved_at = time.monotonic()
        asked = await asyncio.gather(*map(self._ask, sorted(self._addresses)))
        return [worker for worker in asked if worker is not None]

    async def close(self) -> None:
        for link in self._links.values():
            await link.channel.close()

    async def _ask(self, address: str) -> pb.Worker | None:
        if address not in self._links:
            self._links[address] = _Link(open_channel(address, self._security))
        link = self._links[address]
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(link.channel)
        try:
            link.registration = link.registration or await introduce(stub, address)
            load = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=TIMEOUT_SECONDS)
            is_serving = await is_healthy(link.channel)
        except grpc.aio.AioRpcError:
            link.registration = None  # what answers next may be another worker
            return None
        told = worker_load(load, is_serving and not load.is_draining)
        return pb.Worker(worker_id=link.registration.instance_id, registration=link.registration, load=told)


async def resolve(targets: Sequence[str]) -> set[str]:
    """The addresses behind the targets; a name that nobody knows has none now."""
    addresses = {target for target in targets if not target.startswith(DNS)}
    loop = asyncio.get_running_loop()
    for target in targets:
        if target.startswith(DNS):
            host, _, port = target.removeprefix(DNS).strip("/").rpartition(":")
            try:
                found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except OSError:
                continue
            addresses |= {join(str(address[0]), int(port)) for *_, address in found}
    return addresses


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def introduce(stub: worker_pb2_grpc.WorkerServiceAsyncStub, address: str) -> pb.WorkerRegistration:
    """What the worker would have said of itself."""
    model = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=TIMEOUT_SECONDS)
    server = await stub.GetServerInfo(worker_pb2.GetServerInfoRequest(), timeout=TIMEOUT_SECONDS)
    return registration(model, server, address)


async def is_healthy(channel: grpc.aio.Channel) -> bool:
    request = health_pb2.HealthCheckRequest()
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def worker_load(load: worker_pb2.GetLoadResponse, is_serving: bool) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        is_serving=is_serving,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_cache_usage_ratio=load.num_used_blocks / max(load.num_kv_blocks, 1),
        engine_silence_ms=load.engine_silence_ms,
        generation_tokens_per_second=load.generation_tokens_per_second,
    )
