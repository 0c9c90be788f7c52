"""Health follows the engine: silent with work pending, back again, dead."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from gpu_worker.engine.loop import EngineLoop
from gpu_worker.engine.sequence import Request
from gpu_worker.health import WorkerHealth
from gpu_worker.sampling_params import SamplingParams
from protos.rpc.errors import FatalError
from protos.rpc.process import Shutdown
from tests.fakes_model import make_engine
from tests.gpu_worker.test_loop import GatedModel, collect

STALL_SECONDS = 0.3


class HealthService:
    """Notes what is said of the worker."""

    def __init__(self) -> None:
        self.said: list[bool] = []
        self.changed = asyncio.Condition()

    async def set_serving(self, is_serving: bool) -> None:
        async with self.changed:
            self.said.append(is_serving)
            self.changed.notify_all()

    async def until(self, *said: bool) -> None:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: self.said == list(said))


@asynccontextmanager
async def watched(model: GatedModel, shutdown: Shutdown, *, overlap: bool):
    loop, service = EngineLoop(make_engine(model=model, overlap=overlap)), HealthService()
    loop.start()
    watch = asyncio.create_task(WorkerHealth(loop, shutdown, stall_seconds=STALL_SECONDS).run(service))
    try:
        yield loop, service
    finally:
        model.gate.set()
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        loop.close()


def request() -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    return Request("r", (2, 3, 4), params, arrival_time=time.monotonic())


@pytest.mark.parametrize("overlap", [False, True])
async def test_silence_with_work_pending_turns_health_until_the_next_step(overlap):
    model = GatedModel()
    async with watched(model, Shutdown(), overlap=overlap) as (loop, service):
        await asyncio.sleep(2 * STALL_SECONDS)
        assert service.said == []  # idleness is no silence
        model.gate.clear()
        reader = asyncio.create_task(collect(loop, request()))
        await service.until(False)
        assert loop.silence_ms >= STALL_SECONDS * 1e3
        model.gate.set()
        assert (await reader).finish_reason == "length"
        await service.until(False, True)


@pytest.mark.parametrize("overlap", [False, True])
async def test_a_dead_engine_turns_health_and_ends_the_process_with_its_reason(overlap):
    model, shutdown = GatedModel(), Shutdown()
    async with watched(model, shutdown, overlap=overlap) as (loop, service):
        model.error = RuntimeError("an illegal memory access was encountered")
        await asyncio.gather(collect(loop, request()), return_exceptions=True)
        await service.until(False)
        with pytest.raises(FatalError, match="illegal memory access"):
            async with asyncio.timeout(30):
                await shutdown.wait()
