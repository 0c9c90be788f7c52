"""The gateway put together: settings, clients, pipeline, and the two servers in front of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp

from gateway.api_keys import ApiKeys
from gateway.app import build_app, openai_routes, state_routes, tokenize_routes
from gateway.clients import LocalScheduler, RemoteScheduler, SchedulerClient, TokenizerClient, WorkerClient
from gateway.http import OpenAiApi
from gateway.http_server import HttpServer, bind, read_http_tls
from gateway.metrics import GatewayMetrics
from gateway.pipeline import Pipeline
from gateway.playground import Playground, playground_routes
from gateway.readiness import Readiness
from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.follower import Follower, static_workers
from gateway.scheduler.scheduler import Scheduler
from gateway.scheduler.servicer import DESCRIPTOR as SCHEDULER
from gateway.scheduler.servicer import scheduler_service
from gateway.servicer import DESCRIPTOR as GATEWAY
from gateway.servicer import gateway_service
from gateway.settings import GatewaySettings
from gateway.supervisor import Share
from gateway.tokenize import TokenizeApi
from gateway.worker_metrics import WorkersCollector
from protos.rpc.channel import open_channel
from protos.rpc.interceptor import Authenticate
from protos.rpc.security import Security
from protos.rpc.server import GrpcServer
from protos.rpc.telemetry import start_metrics_server


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    http_port: int
    grpc_address: str
    readiness: Readiness
    http_server: HttpServer
    grpc_server: GrpcServer

    async def drain(self, timeout_seconds: float) -> None:
        """Not ready, no new requests; those in flight finish, but take no longer than the timeout."""
        await self.readiness.start_draining()
        await asyncio.gather(self.http_server.drain(timeout_seconds), self.grpc_server.drain(timeout_seconds))


@contextlib.asynccontextmanager
async def running(settings: GatewaySettings, share: Share | None = None) -> AsyncIterator[Gateway]:
    """A gateway that serves while this is open; `share` if it is one of several processes.

    StartupError if a port is taken.
    """
    async with contextlib.AsyncExitStack() as stack:
        security = settings.read_security()
        keys = ApiKeys(settings.api_key, settings.api_key_file)
        follow = share.follow if share else None
        services = [GATEWAY] if settings.scheduler or follow else [GATEWAY, SCHEDULER]
        grpc_server = GrpcServer(settings.listen, services, security=security, authenticate=guard(keys))
        grpc_address = await grpc_server.start()
        stack.push_async_callback(grpc_server.stop)
        if follow:
            scheduler = await follow_scheduler(follow, settings, security, stack)
        else:
            scheduler = await find_scheduler(settings, security, grpc_server, stack)
        tokenizer = TokenizerClient(open_channel(settings.tokenizer, security))
        workers = WorkerClient(security)
        stack.push_async_callback(tokenizer.close)
        stack.push_async_callback(workers.close)
        metrics = GatewayMetrics(share.metrics if share else None)
        readiness = Readiness(tokenizer, scheduler, workers, grpc_server.set_serving)
        metrics.published.register(WorkersCollector(lambda: readiness.workers))
        quotas = settings.quotas()
        pipeline = Pipeline(tokenizer, scheduler, workers, metrics, quotas, settings.max_deltas_per_second)
        grpc_server.add(gateway_service(pipeline, readiness, settings))
        routers = (
            openai_routes(api := OpenAiApi(pipeline, readiness, metrics, settings)),
            tokenize_routes(TokenizeApi(tokenizer, readiness, settings.limits())),
            state_routes(api),
            playground_routes(Playground(readiness, scheduler, workers)),
        )
        app = build_app(routers, metrics, keys, settings)
        http_server = http_server_for(app, settings, is_shared=share is not None)
        await stack.enter_async_context(http_server.running())
        if settings.metrics_port not in (None, http_server.port):
            stack.callback(start_metrics_server(settings.metrics_port or 0, metrics.published).close)
        await stack.enter_async_context(readiness.watching())
        yield Gateway(http_server.port, grpc_address, readiness, http_server, grpc_server)


def http_server_for(app: ASGIApp, settings: GatewaySettings, *, is_shared: bool) -> HttpServer:
    """Bound, and not yet running."""
    tls = read_http_tls(settings.http_tls_cert, settings.http_tls_key)
    return HttpServer(app, bind(settings.http_host, settings.http_port, is_shared=is_shared), tls)


def guard(keys: ApiKeys) -> Authenticate:
    """Keys are for the text API; workers that register at the scheduler here have none."""

    def authenticate(method: str, metadata: dict[str, str | bytes]) -> None:
        if method.startswith(f"/{GATEWAY.full_name}/"):
            keys.check(str(metadata.get("authorization", "")))

    return authenticate


async def find_scheduler(
    settings: GatewaySettings, security: Security, server: GrpcServer, stack: contextlib.AsyncExitStack
) -> SchedulerClient:
    """The shared one if there is one, otherwise one hosted here."""
    if settings.scheduler is not None:
        channel = open_channel(settings.scheduler, security)
        return RemoteScheduler(await stack.enter_async_context(channel))
    dispatcher = Dispatcher(Scheduler(settings.scheduler_config()))
    await stack.enter_async_context(dispatcher.running())
    await stack.enter_async_context(static_workers(settings.static_worker, dispatcher, security))
    server.add(scheduler_service(dispatcher))
    return LocalScheduler(dispatcher)


async def follow_scheduler(
    address: str, settings: GatewaySettings, security: Security, stack: contextlib.AsyncExitStack
) -> SchedulerClient:
    """One of this process's own, for the workers of another."""
    channel = await stack.enter_async_context(open_channel(address, security))
    dispatcher = Dispatcher(Scheduler(settings.scheduler_config()))
    await stack.enter_async_context(dispatcher.running())
    follower = Follower(dispatcher, RemoteScheduler(channel).list_workers)
    await stack.enter_async_context(follower.following())
    return LocalScheduler(dispatcher)
