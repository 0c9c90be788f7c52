"""EngineLoop: coroutines on one side, the engine's thread on the other."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from gpu_worker.engine.errors import EngineDeadError, EngineDrainingError, RequestError
from gpu_worker.engine.loop import EngineLoop
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import POISON, HashModel, make_engine

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = dataclasses.replace(PARAMS, max_tokens=None)


class GatedModel(HashModel):
    """Waits before each forward until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.num_started = 0

    def forward(self, *args):
        self.num_started += 1
        assert self.gate.wait(30)
        return super().forward(*args)


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def loop(request: pytest.FixtureRequest, model: GatedModel) -> Iterator[EngineLoop]:
    loop = EngineLoop(make_engine(model=model, num_blocks=256, max_num_seqs=16, overlap=request.param))
    loop.start()
    yield loop
    model.gate.set()
    loop.close()


def request(name: str, params: SamplingParams = PARAMS, prompt: tuple[int, ...] = (2, 3, 4)) -> Request:
    return Request(name, prompt, params, arrival_time=time.monotonic())


async def collect(loop: EngineLoop, request: Request) -> StepOutput:
    merged: StepOutput | None = None
    async for output in loop.generate(request):
        if merged is None:
            merged = output
        else:
            merged.merge(output)
    assert merged is not None
    return merged


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def has_made(loop: EngineLoop, num_tokens: int) -> bool:
    """Whether it has published so many: what it publishes it has told its readers, or does so next."""
    return loop.stats().num_generation_tokens_total == num_tokens


async def test_many_at_once_get_each_their_own(loop):
    alone = {i: await collect(loop, request(f"alone {i}", prompt=(i,))) for i in range(2, 10)}
    together = await asyncio.gather(*(collect(loop, request(str(i), prompt=(i,))) for i in range(2, 10)))
    assert [output.token_ids for output in together] == [output.token_ids for output in alone.values()]
    await until(lambda: has_made(loop, 2 * 8 * 8) and loop.load().num_used_blocks == 0)


async def test_completions_of_one_request_come_under_their_index(loop):
    params = dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=1)
    finished = [o.index async for o in loop.generate(request("r", params)) if o.finish_reason]
    assert sorted(finished) == [0, 1, 2]


async def test_closing_the_generator_frees_the_blocks(loop):
    async with aclosing(loop.generate(request("r", LONG))) as outputs:
        await anext(outputs)
    await until(lambda: loop.load().num_running == 0 and loop.load().num_used_blocks == 0)
    assert (await collect(loop, request("r"))).finish_reason == "length"


async def test_cancelling_the_reader_frees_the_blocks(loop, model):
    model.gate.clear()
    task = asyncio.create_task(collect(loop, request("r", LONG)))
    await until(lambda: loop.silence_ms > 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    model.gate.set()
    await until(lambda: loop.load().num_running == 0 and loop.load().num_used_blocks == 0)
    assert sum(model.num_forward_tokens) <= 3 + 1  # it ended within one step


async def test_abort_ends_the_stream_of_another_client(loop, model):
    model.gate.clear()
    reader = asyncio.create_task(collect(loop, request("r", LONG)))
    await until(lambda: loop.silence_ms > 0)
    abort = asyncio.create_task(loop.abort("r"))
    await asyncio.sleep(0)  # it waits in the inbox before the request can run to its end
    model.gate.set()
    assert await abort
    assert (await reader).finish_reason == "aborted"
    assert not await loop.abort("r")


async def test_a_slow_reader_gets_fewer_and_longer_outputs(loop):
    lengths = []
    async for output in loop.generate(request("r")):
        lengths.append(len(output.token_ids))
        await until(lambda: has_made(loop, 8))
    assert sum(lengths) == 8
    assert len(lengths) <= 3


async def test_a_refusal_reaches_the_caller_and_nobody_else(loop):
    with pytest.raises(RequestError, match="prompt must hold at least one token"):
        await collect(loop, request("empty", prompt=()))
    poisoned, good = await asyncio.gather(
        collect(loop, request("poisoned", prompt=(2, POISON))), collect(loop, request("good"))
    )
    assert (poisoned.finish_reason, good.finish_reason) == ("error", "length")
    assert loop.is_healthy


async def test_a_device_error_fails_everyone_with_the_reason(loop, model):
    model.gate.clear()
    readers = [asyncio.create_task(collect(loop, request(str(i)))) for i in range(3)]
    await until(lambda: loop.silence_ms > 0)
    model.error = RuntimeError("an illegal memory access was encountered")
    model.gate.set()
    for reader in readers:
        with pytest.raises(EngineDeadError, match="RuntimeError: an illegal memory access"):
            await reader
    assert not loop.is_healthy
    assert "illegal memory access" in str(loop.failure)
    with pytest.raises(EngineDeadError, match="illegal memory access"):
        await collect(loop, request("late"))
    with pytest.raises(EngineDeadError):
        await loop.abort("late")
    assert await loop.drain(1.0) == 0


async def test_drain_waits_and_takes_nothing_new(loop, model):
    model.gate.clear()
    reader = asyncio.create_task(collect(loop, request("r")))
    await until(lambda: loop.silence_ms > 0)
    drain = asyncio.create_task(loop.drain(30))
    await until(lambda: loop.load().is_draining)
    with pytest.raises(EngineDrainingError):
        await collect(loop, request("late"))
    model.gate.set()
    assert await drain == 0
    assert (await reader).finish_reason == "length"


async def test_drain_aborts_what_is_left_after_the_timeout(loop, model):
    model.gate.clear()
    readers = [asyncio.create_task(collect(loop, request(str(i), LONG))) for i in range(2)]
    await until(lambda: loop.silence_ms > 0)
    asyncio.get_running_loop().call_later(0.2, model.gate.set)  # on this loop: never before the timeout
    assert await loop.drain(0.05) == 2
    assert {(await reader).finish_reason for reader in readers} == {"aborted"}


async def test_an_expired_deadline_ends_the_request(loop, model):
    model.gate.clear()
    soon = dataclasses.replace(request("r", LONG), deadline=time.monotonic() + 0.02)
    reader = asyncio.create_task(collect(loop, soon))
    await until(lambda: time.monotonic() > soon.deadline)
    model.gate.set()
    output = await reader
    assert (output.finish_reason, output.error) == ("aborted", "the deadline passed")


async def test_with_overlap_a_step_is_told_of_while_the_next_one_runs():
    model = GatedModel()
    loop = EngineLoop(make_engine(model=model, overlap=True))
    model.gate.clear()
    loop.start()
    outputs = loop.generate(request("r"))
    first = asyncio.create_task(anext(outputs))
    await until(lambda: model.num_started == 1)
    model.gate.set()
    told = len((await first).token_ids)
    assert model.num_started >= 2
    assert sum([len(output.token_ids) async for output in outputs]) + told == 8
    loop.close()
