"""`python -m gpu_worker`: settings -> engine -> loop -> servicer -> serve."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import partial
from importlib import import_module
from threading import Thread
from types import ModuleType
from typing import Any

from prometheus_client import CollectorRegistry

from gpu_worker import facts
from gpu_worker.engine.build import BuiltEngine, EngineArgs, build_engine
from gpu_worker.engine.errors import EngineArgsError, RankError
from gpu_worker.engine.loop import EngineLoop
from gpu_worker.health import WorkerHealth
from gpu_worker.metrics import PREFIX, VLLM_PREFIX, EngineCollector, EngineFacts, RequestMetrics
from gpu_worker.model.errors import CheckpointError, ConfigError
from gpu_worker.model.expert_counts import read_expert_tokens
from gpu_worker.registration import Registrar
from gpu_worker.servicer import WorkerServicer
from gpu_worker.settings import WorkerSettings
from gpu_worker.structured import load_grammars
from protos.rpc.errors import FatalError, StartupError
from protos.rpc.process import Shutdown, run_service
from protos.rpc.registration import registration
from protos.rpc.server import GrpcServer, Service
from protos.rpc.telemetry import configure_logging, start_metrics_server
from protos.rpc.tracing import configure_tracing
from protos.wint2.scheduler.v1 import scheduler_pb2
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
CLOSE_SECONDS = 5.0
PROGRESS_SECONDS = 2.0
RANKS_SECONDS = 0.2


def main() -> None:
    settings = WorkerSettings.from_command_line(sys.argv[1:])
    configure_logging(settings.log_level, "worker", settings.log_format)
    run_service(lambda shutdown: serve(settings, shutdown), expected=(ConfigError, CheckpointError))


async def serve(settings: WorkerSettings, shutdown: Shutdown) -> None:
    """Listens first, so that health and a port in use show before the model loads; serves once it has."""
    configure_tracing("worker", settings.tracing_endpoint)
    registry = CollectorRegistry()
    vllm = load_vllm(settings)
    services = [SERVICE, vllm.DESCRIPTOR] if vllm else [SERVICE]
    server = GrpcServer(settings.listen, services, security=settings.read_security())
    async with server.listening() as address:
        if settings.metrics_port is not None:
            start_metrics_server(settings.metrics_port, registry)
        built = await asyncio.to_thread(build, settings)
        await run(settings, built, server, address, shutdown, registry)


async def run(
    settings: WorkerSettings,
    built: BuiltEngine,
    server: GrpcServer,
    address: str,
    shutdown: Shutdown,
    registry: CollectorRegistry,
) -> None:
    """SERVING until the process is asked to end."""
    async with running(built) as loop:
        worker = Worker(settings, built, loop, shutdown, registry)
        server.add(worker_service(worker.servicer))
        if vllm := load_vllm(settings):
            server.add(vllm.vllm_service(worker.servicer))
        registrars = worker.registrars(settings.advertise or address)
        async with background(shutdown, worker.health.run(server), watch_ranks(built, shutdown), *registrars):
            await server.serve(shutdown, drain_timeout_seconds=settings.drain_timeout)


def worker_service(servicer: WorkerServicer) -> Service:
    """A gateway's GenerateMany lasts as long as the gateway; a drain awaits the calls in it."""
    add = worker_pb2_grpc.add_WorkerServiceServicer_to_server
    return Service(SERVICE, add, servicer, background=frozenset({"GenerateMany"}))


def load_vllm(settings: WorkerSettings) -> ModuleType | None:
    """The service that speaks as vLLM does, if it is asked for: its messages are an optional package."""
    if not settings.vllm_grpc:
        return None
    try:
        return import_module("gpu_worker.vllm_servicer")
    except ImportError as error:
        raise StartupError('--vllm-grpc needs its messages: pip install "wint2[vllm-grpc]"') from error


def build(settings: WorkerSettings) -> BuiltEngine:
    """The engine that the flags ask for; logs what it found."""
    try:
        args = EngineArgs(**{field.name: getattr(settings, field.name) for field in fields(EngineArgs)})
        built = build_engine(args, LoadProgress(), load_grammars)
    except EngineArgsError as error:
        raise StartupError(
            f"--{str(error).replace(error.field, error.field.replace('_', '-'), 1)}"
        ) from error
    except RankError as error:
        raise FatalError(str(error)) from error
    for line in built.description:
        logger.info(line)
    return built


class LoadProgress:
    """A line every few seconds, and one at the end."""

    def __init__(self) -> None:
        self._start_time = self._log_time = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes >= total_bytes:
            logger.info("weights: %.1f MiB read in %.1f s", total_bytes / 2**20, now - self._start_time)
        elif now - self._log_time >= PROGRESS_SECONDS:
            self._log_time = now
            logger.info(
                "weights: %d%% of %.1f MiB read", 100 * done_bytes // total_bytes, total_bytes / 2**20
            )


class Worker:
    """The parts around a running engine loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        built: BuiltEngine,
        loop: EngineLoop,
        shutdown: Shutdown,
        registry: CollectorRegistry,
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._model = facts.model_info(settings, built)
        self._server = facts.server_info(built.config)
        prefixes = (PREFIX, VLLM_PREFIX) if settings.metrics_compat == "vllm" else (PREFIX,)
        metrics = RequestMetrics(registry, self._model.served_model_name, prefixes)
        experts = partial(read_expert_tokens, built.model)
        about = EngineFacts(
            silence_ms=lambda: loop.silence_ms,
            expert_tokens=experts,
            cache_config=facts.cache_config(built.config.cache),
        )
        registry.register(EngineCollector(loop.stats, self._model.served_model_name, prefixes, about))
        self.servicer = WorkerServicer(loop, self._model, self._server, metrics, experts)
        self.health = WorkerHealth(loop, shutdown, stall_seconds=settings.stall_timeout)

    def registrars(self, address: str) -> list[Coroutine[Any, Any, None]]:
        """One for each scheduler, to be run beside the server."""
        offer = registration(self._model, self._server, address)
        security = self._settings.read_security()
        return [
            Registrar(scheduler, offer, self.load, self.health, security).run()
            for scheduler in self._settings.scheduler
        ]

    def load(self) -> scheduler_pb2.WorkerLoad:
        load = self._loop.load()
        return scheduler_pb2.WorkerLoad(
            is_serving=self.health.is_serving,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage_ratio=load.num_used_blocks / max(load.num_blocks, 1),
            engine_silence_ms=self._loop.silence_ms,
            generation_tokens_per_second=load.generation_tokens_per_second,
        )


@asynccontextmanager
async def running(built: BuiltEngine) -> AsyncIterator[EngineLoop]:
    """A started engine loop, closed at the end. FatalError if the device does not come back."""
    loop = EngineLoop(built.engine)
    loop.start()
    try:
        yield loop
    finally:
        await _within(CLOSE_SECONDS, loop.close)
        built.close()


async def watch_ranks(built: BuiltEngine, shutdown: Shutdown) -> None:
    """Ends the process, and says why, once another rank of its group has ended; cancel it otherwise."""
    while built.failure is None:
        await asyncio.sleep(RANKS_SECONDS)
    shutdown.request(failure=built.failure)


async def _within(seconds: float, function: Callable[[], None]) -> None:
    """Runs a function that may hang in the device on a thread that does not keep the process alive."""
    thread = Thread(target=function, daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, seconds)
    if thread.is_alive():
        raise FatalError(f"the engine did not stop within {seconds:g} s")


@asynccontextmanager
async def background(shutdown: Shutdown, *tasks: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs coroutines beside the body, and cancels them after it. One that fails ends the process."""

    def check(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            shutdown.request(failure=f"{type(error).__name__}: {error}")

    started = [asyncio.create_task(task) for task in tasks]
    for task in started:
        task.add_done_callback(check)
    try:
        yield
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


if __name__ == "__main__":
    main()
