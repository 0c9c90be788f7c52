"""VllmEngine over a real engine: streams, whole answers, refusals, and what a foreign gateway asks first."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from contextlib import asynccontextmanager

import grpc
import pytest
from prometheus_client import CollectorRegistry
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as smg

from gpu_worker.engine.loop import EngineLoop
from gpu_worker.metrics import RequestMetrics
from gpu_worker.servicer import WorkerServicer
from gpu_worker.vllm_servicer import vllm_service
from protos.rpc.errors import from_rpc_error
from protos.wint2.worker.v1 import worker_pb2
from tests.fakes import connected, worker_service
from tests.fakes_model import VOCAB_SIZE, make_engine

LIMIT = 64  # max_model_len of make_engine


@asynccontextmanager
async def engine(model_path: str = "/m"):
    """A stub of VllmEngine on the hash model, and the engine loop behind it."""
    loop = EngineLoop(make_engine())
    loop.start()
    model = worker_pb2.GetModelInfoResponse(
        served_model_name="hash", model_path=model_path, max_model_len=LIMIT, vocab_size=VOCAB_SIZE
    )
    server = worker_pb2.GetServerInfoResponse(version="1", block_size=4, max_num_seqs=8)
    worker = WorkerServicer(loop, model, server, RequestMetrics(CollectorRegistry(), "hash"))
    try:
        async with connected(worker_service(worker), vllm_service(worker)) as channel, asyncio.timeout(30):
            yield vllm_engine_pb2_grpc.VllmEngineStub(channel), loop
    finally:
        loop.close()


def request(ids=(5, 6, 7), stream=False, **params):
    return vllm.GenerateRequest(
        request_id="r",
        tokenized=vllm.TokenizedInput(input_ids=ids),
        stream=stream,
        sampling_params=vllm.SamplingParams(
            **{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params}
        ),
    )


async def answers(stub, message):
    return [response async for response in stub.Generate(message)]


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def test_a_stream_gives_the_tokens_of_the_whole_answer():
    async with engine() as (stub, _):
        [whole] = await answers(stub, request(logprobs=2))
        *chunks, last = await answers(stub, request(stream=True, logprobs=2))
        streamed = [token_id for chunk in chunks for token_id in chunk.chunk.token_ids]
        assert streamed == list(whole.complete.output_ids)
        assert whole.complete.completion_tokens == sum(c.chunk.completion_tokens for c in chunks) == 6
        assert whole.complete.finish_reason == last.complete.finish_reason == "length"
        assert list(whole.complete.output_logprobs.token_ids) == streamed
        assert all(len(top.values) == 2 for top in whole.complete.output_logprobs.top_logprobs)
        assert chunks[0].chunk.prompt_tokens == whole.complete.prompt_tokens == 3


async def test_a_stop_token_is_named_and_prompts_are_scored():
    async with engine() as (stub, _):
        [whole] = await answers(stub, request())
        stop = whole.complete.output_ids[2]
        [stopped] = await answers(stub, request(stop_token_ids=[stop], prompt_logprobs=1))
        assert (stopped.complete.finish_reason, stopped.complete.matched_token_id) == ("stop", stop)
        scored = stopped.complete.input_logprobs
        assert list(scored.token_ids) == [5, 6, 7]
        assert [value.HasField("value") for value in scored.token_logprobs] == [False, True, True]


async def test_n_completions_have_an_index_each():
    async with engine() as (stub, _):
        found = await answers(stub, request(n=3, temperature=1, seed=7))
        assert sorted(answer.complete.index for answer in found) == [0, 1, 2]
        assert len({tuple(answer.complete.output_ids) for answer in found}) > 1


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (vllm.GenerateRequest(text="hi"), "tokenized"),
        (request(()), "prompt"),
        (request(logprobs=-1), "sampling_params.logprobs"),
        (request(prompt_logprobs=21), "sampling_params.prompt_logprobs"),
        (request(logit_bias={-1: 1.0}), "sampling_params.logit_bias"),
        (request(truncate_prompt_tokens=1), "sampling_params.truncate_prompt_tokens"),
        (request(structural_tag="x"), "sampling_params.structural_tag"),
        (request(temperature=9), "sampling_params.temperature"),
    ],
)
async def test_what_it_does_not_do_is_refused_by_name(message, field):
    async with engine() as (stub, _):
        assert (await refusal(stub.Generate(message))).field == field


async def test_leaving_and_aborting_free_the_blocks():
    async with engine() as (stub, loop):
        call = stub.Generate(request(stream=True, max_tokens=60))
        await call.read()
        call.cancel()
        call = stub.Generate(request(stream=True, max_tokens=60))
        await call.read()
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]))
        while loop.load().num_used_blocks:
            await asyncio.sleep(0.01)


async def test_what_a_gateway_asks_first(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    async with engine(str(tmp_path)) as (stub, _):
        model = await stub.GetModelInfo(vllm.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length, model.is_generation) == (
            "hash",
            LIMIT,
            True,
        )
        assert (await stub.GetServerInfo(vllm.GetServerInfoRequest())).max_num_seqs == 8
        assert (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
        [load] = (await stub.GetLoads(vllm.GetLoadsRequest())).loads
        assert (load.max_total_num_tokens, load.num_running_reqs) == (64 * 4, 0)
        chunks = [chunk async for chunk in stub.GetTokenizer(smg.GetTokenizerRequest())]
        bundle = b"".join(chunk.data for chunk in chunks)
        assert zipfile.ZipFile(io.BytesIO(bundle)).namelist() == ["tokenizer.json"]
        assert chunks[-1].sha256 == hashlib.sha256(bundle).hexdigest()
        events = stub.SubscribeKvEvents(smg.SubscribeKvEventsRequest())
        assert (await events.read()).load.load_only
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(vllm.EmbedRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
