"""A worker's presence at schedulers that come, go and come back."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager

from gpu_worker.health import WorkerHealth
from gpu_worker.registration import Registrar
from protos.rpc.process import Shutdown
from protos.wint2.scheduler.v1 import scheduler_pb2
from tests.fakes import FakeScheduler, scheduler_service, serving

REGISTRATION = scheduler_pb2.WorkerRegistration(
    instance_id="i", address="127.0.0.1:1", model="m", max_num_seqs=8
)


class IdleEngine:
    """The part of an engine loop that health reads."""

    is_healthy = True
    failure = None
    is_draining = False
    silence_ms = 0

    def load(self):
        return self


class FakeGrpcServer:
    async def set_serving(self, is_serving):
        pass


@asynccontextmanager
async def registered(*addresses, engine=None, shutdown=None):
    """A worker that keeps itself registered at these schedulers."""
    health = WorkerHealth(engine or IdleEngine(), shutdown or Shutdown(), stall_seconds=1)

    def load():
        return scheduler_pb2.WorkerLoad(is_serving=health.is_serving, num_running=3)

    watch = asyncio.create_task(health.run(FakeGrpcServer()))
    tasks = [watch, *(asyncio.create_task(Registrar(a, REGISTRATION, load, health).run()) for a in addresses)]
    try:
        async with asyncio.timeout(30):
            yield health
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(claim):
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.01)


async def test_registers_first_and_reports_load_at_least_once_a_second():
    scheduler = FakeScheduler()
    async with serving(scheduler_service(scheduler)) as address, registered(address):
        await until(lambda: len(scheduler.loads) >= 3)
        assert scheduler.registrations == [REGISTRATION]
        assert scheduler.loads[0] == scheduler_pb2.WorkerLoad(is_serving=True, num_running=3)
    await until(lambda: scheduler.num_connected == 0)


async def test_a_change_of_state_is_told_at_once():
    scheduler, shutdown = FakeScheduler(), Shutdown()
    async with serving(scheduler_service(scheduler)) as address, registered(address, shutdown=shutdown):
        await until(lambda: scheduler.loads)
        shutdown.request()
        async with asyncio.timeout(0.6):
            await until(lambda: not scheduler.loads[-1].is_serving)


async def test_several_schedulers_all_know_the_worker():
    first, second = FakeScheduler(), FakeScheduler()
    async with (
        serving(scheduler_service(first)) as one,
        serving(scheduler_service(second)) as two,
        registered(one, two),
    ):
        await until(lambda: first.loads and second.loads)


async def test_a_scheduler_may_start_later_and_come_back(tmp_path, caplog):
    address = f"unix:{tmp_path}/scheduler.sock"
    async with registered(address):
        await asyncio.sleep(0.3)
        for _ in range(2):
            scheduler = FakeScheduler()
            async with serving(scheduler_service(scheduler), listen=address):
                await until(lambda seen=scheduler: seen.registrations and seen.loads)
    lost = [line for line in caplog.messages if "not registered" in line]
    assert 2 <= len(lost) <= 3, "one line for each time it is lost, however often it tries"


async def test_a_stalled_engine_is_not_serving_until_it_moves_again(caplog):
    caplog.set_level(logging.INFO)
    engine, scheduler = IdleEngine(), FakeScheduler()
    async with serving(scheduler_service(scheduler)) as address, registered(address, engine=engine):
        await until(lambda: scheduler.loads)
        engine.silence_ms = 5000
        await until(lambda: not scheduler.loads[-1].is_serving)
        engine.silence_ms = 0
        await until(lambda: scheduler.loads[-1].is_serving)
    assert any("no step for 1 s" in line for line in caplog.messages)


async def test_a_dead_engine_ends_the_process():
    engine, shutdown = IdleEngine(), Shutdown()
    async with registered(engine=engine, shutdown=shutdown) as health:
        engine.failure = "the device is lost"
        engine.is_healthy = False
        await until(lambda: shutdown.is_requested)
        assert not health.is_serving
