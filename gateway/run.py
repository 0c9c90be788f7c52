"""One gateway process from its start to its end: servers up, signals drain."""

from __future__ import annotations

import gc
import os

import uvloop

from gateway.settings import GatewaySettings
from gateway.stack import running
from gateway.supervisor import Share, parent_watched
from protos.rpc.process import Shutdown, run_service
from protos.rpc.telemetry import configure_logging
from protos.rpc.tracing import configure_tracing


async def serve(settings: GatewaySettings, share: Share | None, shutdown: Shutdown) -> None:
    configure_tracing("gateway", settings.tracing_endpoint)
    async with running(settings, share) as gateway:
        shutdown.arm()
        tune_garbage_collection()
        url = f"http://{settings.http_host}:{gateway.http_port}"
        # In one write: other processes may say the same on the same terminal.
        print(f"ready gateway on {url}, gRPC on {gateway.grpc_address}\n", end="", flush=True)
        with parent_watched(shutdown):
            await shutdown.wait()
        await gateway.drain(settings.drain_timeout)


def tune_garbage_collection() -> None:
    """What lives for good is not looked at again, and what requests leave is mostly freed without a look."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def run(settings: GatewaySettings, share: Share | None = None) -> None:
    """One process. With others beside it, it leaves a terminal's Ctrl-C to the one that started them."""
    if share is not None:
        os.setsid()
    configure_logging(settings.log_level, "gateway", settings.log_format)
    run_service(lambda shutdown: serve(settings, share, shutdown), loop_factory=uvloop.new_event_loop)
