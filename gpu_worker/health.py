"""Whether the worker takes requests and makes progress: told to health checks and schedulers."""

from __future__ import annotations

import asyncio
import logging

from gpu_worker.engine.loop import EngineLoop
from protos.rpc.process import Shutdown
from protos.rpc.server import GrpcServer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2


class WorkerHealth:
    """SERVING while the engine is alive, not draining, and not `stall_seconds` silent with work pending."""

    def __init__(self, engine: EngineLoop, shutdown: Shutdown, *, stall_seconds: float) -> None:
        self._engine = engine
        self._shutdown = shutdown
        self._stall_seconds = stall_seconds
        self._changed = asyncio.Event()
        self._trouble: str | None = None

    @property
    def is_serving(self) -> bool:
        return self._trouble is None

    async def run(self, server: GrpcServer) -> None:
        """Watches the engine until it is dead, which ends the process; cancel it otherwise."""
        while self._engine.is_healthy:
            await self._update(server)
            await asyncio.sleep(POLL_SECONDS)
        await self._update(server)
        self._shutdown.request(failure=self._engine.failure)

    async def wait_changed(self, timeout_seconds: float) -> None:
        """Returns at the next change of `is_serving`, or after the timeout."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_seconds)
        except TimeoutError:
            return

    async def _update(self, server: GrpcServer) -> None:
        trouble = self._find_trouble()
        if trouble == self._trouble:
            return
        self._trouble = trouble
        logger.log(
            logging.WARNING if trouble else logging.INFO,
            "health: %s",
            f"NOT_SERVING, {trouble}" if trouble else "SERVING again",
        )
        # Those who wait now are woken; later ones wait for the next change.
        self._changed.set()
        self._changed = asyncio.Event()
        await server.set_serving(trouble is None)

    def _find_trouble(self) -> str | None:
        engine = self._engine
        if not engine.is_healthy:
            return "the engine is dead"
        if self._shutdown.is_requested or engine.load().is_draining:
            return "draining"
        if engine.silence_ms > self._stall_seconds * 1e3:
            return f"no step for {self._stall_seconds:g} s although there is work"
        return None
