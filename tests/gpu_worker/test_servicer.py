"""WorkerService over real sockets and a real engine: streams, refusals, and blocks that always come back."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from prometheus_client import CollectorRegistry

from gpu_worker import messages
from gpu_worker.engine.loop import EngineLoop
from gpu_worker.metrics import RequestMetrics
from gpu_worker.sampling_params import SamplingParams as EngineParams
from gpu_worker.sampling_params import StructuredOutput
from gpu_worker.servicer import WorkerServicer
from protos.rpc.errors import ContextLengthError, InvalidArgumentError, UnavailableError, from_rpc_error
from protos.wint2.common.v1 import common_pb2
from protos.wint2.common.v1.common_pb2 import SamplingParams, TokenIds
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fakes import connected, worker_service
from tests.fakes_model import EOS, VOCAB_SIZE, HashModel, make_engine
from tests.gpu_worker.naive_engine import prompt_logprobs

LIMIT = 64  # max_model_len of make_engine


class SlowModel(HashModel):
    """Takes its time, so that a test can act in the middle of a completion."""

    def forward(self, batch, kv_cache):
        time.sleep(0.02)
        return super().forward(batch, kv_cache)


@asynccontextmanager
async def worker(model=None, **limits):
    """A stub of a worker on the hash model, and the engine loop behind it."""
    engine = make_engine(model=model, **limits)
    loop = EngineLoop(engine)
    loop.start()
    info = worker_pb2.GetModelInfoResponse(
        served_model_name="hash", max_model_len=LIMIT, vocab_size=VOCAB_SIZE
    )
    servicer = WorkerServicer(
        loop,
        info,
        worker_pb2.GetServerInfoResponse(instance_id="i", block_size=4),
        RequestMetrics(CollectorRegistry(), "hash"),
    )
    try:
        async with connected(worker_service(servicer)) as channel, asyncio.timeout(30):
            yield worker_pb2_grpc.WorkerServiceStub(channel), loop
    finally:
        loop.close()


def request(ids=(5, 6, 7), request_id="", **params):
    return worker_pb2.GenerateRequest(
        request_id=request_id,
        prompt=TokenIds(ids=ids),
        sampling_params=SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params}),
    )


async def collect(call):
    """(prompt info, ids, finish) of a stream, its order checked."""
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events] == [
        "prompt_info",
        *["delta"] * (len(events) - 2),
        "finish",
    ]
    ids = [token_id for event in events[1:-1] for token_id in event.delta.token_ids]
    return events[0].prompt_info, ids, events[-1].finish


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def until_idle(stub):
    """Waits until no sequence holds a block."""
    while (load := await stub.GetLoad(worker_pb2.GetLoadRequest())).num_used_blocks or load.num_running:
        await asyncio.sleep(0.01)
    assert load.num_waiting == 0
    assert load.num_kv_blocks == 64


async def test_a_completion_is_info_then_deltas_then_finish():
    async with worker() as (stub, _):
        info, ids, finish = await collect(stub.Generate(request()))
        assert (info.prompt_tokens, info.cached_tokens, info.effective_params.max_tokens) == (3, 0, 8)
        assert (info.effective_params.top_p, info.effective_params.HasField("seed")) == (1, False)
        assert len(ids) == 8
        assert finish.reason == common_pb2.FINISH_REASON_LENGTH
        assert finish.usage == common_pb2.Usage(prompt_tokens=3, completion_tokens=8)
        assert finish.timings.prefill_ms > 0
        await until_idle(stub)


async def test_without_max_tokens_a_completion_may_fill_the_context():
    async with worker() as (stub, _):
        message = request()
        message.sampling_params.ClearField("max_tokens")
        info, ids, _ = await collect(stub.Generate(message))
        assert info.effective_params.max_tokens == len(ids) == LIMIT - 3


async def test_stop_tokens_end_a_completion_and_are_named():
    async with worker() as (stub, _):
        _, ids, _ = await collect(stub.Generate(request()))
        _, stopped, finish = await collect(stub.Generate(request(stop_token_ids=[ids[3]])))
        assert stopped == ids[: ids.index(ids[3]) + 1]
        assert finish.reason == common_pb2.FINISH_REASON_STOP
        assert finish.stop_token_id == ids[3]


async def test_logprobs_come_with_every_token():
    async with worker() as (stub, _):
        events = [event async for event in stub.Generate(request(logprobs=2))]
        deltas = [event.delta for event in events if event.HasField("delta")]
        positions = [position for delta in deltas for position in delta.logprobs]
        ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert [position.sampled.token_id for position in positions] == ids
        assert all(len(position.top) == 2 for position in positions)
        assert all(position.top[0] == position.sampled for position in positions), (
            "greedy takes the likeliest"
        )


async def test_completions_of_one_prompt_come_under_their_index():
    async with worker() as (stub, _):
        events = [event async for event in stub.Generate(request(n=3, temperature=1, seed=7))]
        assert [event.WhichOneof("event") for event in events].count("prompt_info") == 1
        finishes = [event.finish for event in events if event.HasField("finish")]
        assert sorted(finish.index for finish in finishes) == [0, 1, 2]
        for index in range(3):
            _, alone, _ = await collect(stub.Generate(request(temperature=1, seed=7 + index)))
            deltas = [event.delta for event in events if event.HasField("delta")]
            assert [i for delta in deltas if delta.index == index for i in delta.token_ids] == alone


async def test_a_prompt_is_scored_token_by_token():
    async with worker(max_num_batched_tokens=8) as (stub, _):
        prompt = [5, 6, 7] * 6
        info, _, _ = await collect(stub.Generate(request(prompt, prompt_logprobs=2, max_tokens=1)))
        assert [position.sampled.token_id for position in info.prompt_logprobs] == prompt[1:]
        assert all(len(position.top) == 2 for position in info.prompt_logprobs)
        scores = [position.sampled.logprob for position in info.prompt_logprobs]
        assert scores == pytest.approx(prompt_logprobs(prompt), abs=1e-4)


async def test_every_parameter_reaches_the_engine_and_is_told_back():
    wanted = SamplingParams(
        bad_words_token_ids=[TokenIds(ids=[5, 6]), TokenIds(ids=[7])],
        allowed_token_ids=range(5, 20),
        prompt_logprobs=0,
        logit_bias={9: 2},
        stop_token_ids=[19],
        n=2,
    )
    async with worker() as (stub, _):
        message = request()
        message.sampling_params.MergeFrom(wanted)
        events = [event async for event in stub.Generate(message)]
        effective = events[0].prompt_info.effective_params
        for field, value in wanted.ListFields():
            assert getattr(effective, field.name) == value
        ids = [token_id for event in events for token_id in event.delta.token_ids]
        assert set(ids) <= set(range(5, 20)) - {7}


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutput(json_object=True),
        StructuredOutput(json_schema={"type": "object"}),
        StructuredOutput(regex="a+"),
        StructuredOutput(grammar='start: "a"'),
        StructuredOutput(choice=["a", "b"]),
    ],
)
def test_structured_output_survives_the_wire(wanted):
    params = messages.write_params(EngineParams(structured_output=wanted))
    assert messages.read_params(params).structured_output == wanted


async def test_a_completion_does_not_depend_on_company():
    async with worker() as (stub, _):
        alone = [(await collect(stub.Generate(request((5, i)))))[1] for i in range(6)]
        calls = [collect(stub.Generate(request((5, i)))) for i in range(6)]
        together = [ids for _, ids, _ in await asyncio.gather(*calls)]
        assert together == alone


async def test_the_same_prompt_again_comes_from_the_prefix_cache():
    async with worker() as (stub, _):
        prompt = list(range(2, 22))
        _, first, _ = await collect(stub.Generate(request(prompt)))
        info, again, finish = await collect(stub.Generate(request(prompt)))
        assert again == first
        assert info.cached_tokens == finish.usage.cached_tokens >= 16
        salted = request(prompt)
        salted.cache_salt = "other tenant"
        info, _, _ = await collect(stub.Generate(salted))
        assert info.cached_tokens == 0


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"temperature": 5}, "sampling_params.temperature", "between 0.0 and 2.0, got 5.0"),
        ({"temperature": math.nan}, "sampling_params.temperature", "got nan"),
        ({"top_p": -0.5}, "sampling_params.top_p", "between 0.0 and 1.0"),
        ({"min_p": 2}, "sampling_params.min_p", "between 0.0 and 1.0"),
        ({"repetition_penalty": 0}, "sampling_params.repetition_penalty", "greater than 0"),
        ({"presence_penalty": 3}, "sampling_params.presence_penalty", "between -2.0 and 2.0"),
        ({"frequency_penalty": -3}, "sampling_params.frequency_penalty", "between -2.0 and 2.0"),
        ({"max_tokens": 0}, "sampling_params.max_tokens", "at least 1, got 0"),
        ({"min_tokens": 9}, "sampling_params.min_tokens", "between 0 and 8, got 9"),
        ({"logprobs": 21}, "sampling_params.logprobs", "between 0 and 20, got 21"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "sampling_params.stop_token_ids", f"0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {VOCAB_SIZE: 1}}, "sampling_params.logit_bias", f"0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {5: 101}}, "sampling_params.logit_bias", "between -100"),
        ({"logit_bias": {5: math.inf}}, "sampling_params.logit_bias", "between -100"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "sampling_params.allowed_token_ids", f"0 to {VOCAB_SIZE - 1}"),
        ({"bad_words_token_ids": [TokenIds()]}, "sampling_params.bad_words_token_ids", "empty run"),
        ({"prompt_logprobs": 21}, "sampling_params.prompt_logprobs", "between 0 and 20, got 21"),
        ({"n": 129}, "sampling_params.n", "between 1 and 128, got 129"),
        ({"structured_output": {}}, "sampling_params.structured_output", "none given"),
        ({"structured_output": {"regex": "a"}}, "sampling_params.structured_output", "tokenizer"),
        ({"ids": ()}, "prompt", "at least one token"),
        ({"ids": (5, VOCAB_SIZE)}, "prompt", f"token id {VOCAB_SIZE} at position 1"),
        ({"request_id": "x" * 300}, "request_id", "at most 256 characters, got 300"),
    ],
)
async def test_a_bad_field_is_named_with_its_limit(change, field, words):
    async with worker() as (stub, _):
        error = await refusal(stub.Generate(request(**change)))
        assert isinstance(error, InvalidArgumentError)
        assert error.field == field
        assert error.message.startswith(field)
        assert words in error.message
        assert len((await collect(stub.Generate(request())))[1]) == 8, "the worker goes on"


@pytest.mark.parametrize(("num_ids", "max_tokens"), [(LIMIT, None), (LIMIT + 1, 1), (60, 10)])
async def test_what_does_not_fit_the_context_is_refused_with_the_numbers(num_ids, max_tokens):
    async with worker() as (stub, _):
        message = request([5] * num_ids)
        if max_tokens is None:
            message.sampling_params.ClearField("max_tokens")
        else:
            message.sampling_params.max_tokens = max_tokens
        error = await refusal(stub.Generate(message))
        assert isinstance(error, ContextLengthError)
        assert error.metadata["prompt_tokens"] == str(num_ids)
        assert error.metadata["max_model_len"] == str(LIMIT)
        assert str(num_ids) in error.message


async def test_request_ids_are_unique_while_they_live():
    async with worker(SlowModel()) as (stub, _):
        first = aiter(stub.Generate(request(request_id="a", max_tokens=50)))
        await anext(first)
        error = await refusal(stub.Generate(request(request_id="a")))
        assert error.field == "request_id"
        assert len([event async for event in first]) >= 2, "the first goes on"
        await collect(stub.Generate(request(request_id="a")))


async def test_cancelling_frees_the_blocks_at_once():
    async with worker(SlowModel()) as (stub, _):
        call = stub.Generate(request(max_tokens=60))
        responses = aiter(call)
        await anext(responses)
        while not (await stub.GetLoad(worker_pb2.GetLoadRequest())).num_used_blocks:
            await asyncio.sleep(0.01)
        call.cancel()
        async with asyncio.timeout(0.5):
            await until_idle(stub)


async def test_a_deadline_frees_the_blocks():
    async with worker(SlowModel()) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _event in stub.Generate(request(max_tokens=60), timeout=0.2):
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(0.5):
            await until_idle(stub)


async def test_abort_ends_by_id_and_tells_which():
    async with worker(SlowModel()) as (stub, _):
        responses = aiter(stub.Generate(request(request_id="a", max_tokens=60)))
        await anext(responses)
        answer = await stub.Abort(worker_pb2.AbortRequest(request_ids=["a", "unknown"]))
        assert list(answer.aborted_request_ids) == ["a"]
        finish = [event async for event in responses][-1].finish
        assert finish.reason == common_pb2.FINISH_REASON_ABORTED
        assert 0 < finish.usage.completion_tokens < 60
        await until_idle(stub)


async def test_drain_waits_for_the_running_and_takes_no_new_ones():
    async with worker(SlowModel()) as (stub, _):
        responses = aiter(stub.Generate(request(max_tokens=20)))
        await anext(responses)
        drained = asyncio.ensure_future(stub.Drain(worker_pb2.DrainRequest()))
        while not (await stub.GetLoad(worker_pb2.GetLoadRequest())).is_draining:
            await asyncio.sleep(0.01)
        error = await refusal(stub.Generate(request()))
        assert isinstance(error, UnavailableError)
        assert (error.reason, error.retry_after_seconds) == ("DRAINING", 1.0)
        assert [event async for event in responses][-1].finish.usage.completion_tokens == 20
        assert (await drained).num_aborted == 0


async def test_drain_aborts_what_is_not_done_in_time():
    async with worker(SlowModel()) as (stub, _):
        responses = aiter(stub.Generate(request(max_tokens=60)))
        await anext(responses)
        assert (await stub.Drain(worker_pb2.DrainRequest(timeout_seconds=0.1))).num_aborted == 1
        assert [event async for event in responses][-1].finish.reason == common_pb2.FINISH_REASON_ABORTED
        await until_idle(stub)


async def test_a_negative_drain_timeout_is_refused():
    async with worker() as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drain(worker_pb2.DrainRequest(timeout_seconds=-1))
        assert from_rpc_error(caught.value).field == "timeout_seconds"


async def test_a_device_failure_tells_every_caller_why():
    model = SlowModel()
    async with worker(model) as (stub, loop):
        calls = [aiter(stub.Generate(request((5, i), max_tokens=60))) for i in range(3)]
        for call in calls:
            await anext(call)
        model.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        for call in calls:
            error = await refusal(call)
            assert isinstance(error, UnavailableError)
            assert error.reason == "ENGINE_DEAD"
            assert "illegal memory access" in error.message
        assert not loop.is_healthy
        assert (await refusal(stub.Generate(request()))).reason == "ENGINE_DEAD"


async def test_a_slow_reader_gets_every_token_in_fewer_messages():
    async with worker() as (stub, _):
        responses = aiter(stub.Generate(request(max_tokens=61)))
        events = [await anext(responses)]
        await asyncio.sleep(0.3)
        events += [event async for event in responses]
        assert sum(len(event.delta.token_ids) for event in events) == 61


async def test_what_it_is_and_how_it_runs():
    async with worker() as (stub, _):
        assert (await stub.GetModelInfo(worker_pb2.GetModelInfoRequest())).served_model_name == "hash"
        server = await stub.GetServerInfo(worker_pb2.GetServerInfoRequest())
        assert (server.instance_id, server.block_size) == ("i", 4)
        assert server.uptime_seconds > 0


async def test_end_of_sequence_ends_unless_ignored():
    async with worker() as (stub, _):
        biased = {"logit_bias": {EOS: 100}}
        _, ids, finish = await collect(stub.Generate(request(ignore_eos=False, **biased)))
        assert ids == [EOS]
        assert finish.stop_token_id == EOS
        _, ids, _ = await collect(stub.Generate(request(ignore_eos=False, min_tokens=3, **biased)))
        assert len(ids) > 3


async def test_tokens_gather_for_a_request_that_asks_for_it():
    async with worker(model=SlowModel()) as (stub, _):
        eager, patient = request(max_tokens=12), request(max_tokens=12)
        patient.min_delta_interval_ms = 100
        one_by_one, gathered = [
            [list(r.delta.token_ids) async for r in stub.Generate(asked) if r.HasField("delta")]
            for asked in (eager, patient)
        ]
        assert [one for run in gathered for one in run] == [one for run in one_by_one for one in run]
        assert len(gathered[0]) == 1  # the first token does not wait
        assert len(gathered) < len(one_by_one)
