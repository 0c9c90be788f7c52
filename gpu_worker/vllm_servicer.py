"""vllm.grpc.engine.VllmEngine over WorkerService, for gateways that were made for vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from smg_grpc_proto.generated import common_pb2 as smg

from gpu_worker.servicer import WorkerServicer
from gpu_worker.vllm_messages import Answer, read_request
from protos.rpc.errors import NotFoundError, UnimplementedError
from protos.rpc.interceptor import Context
from protos.rpc.server import Service
from protos.wint2.worker.v1 import worker_pb2

DESCRIPTOR = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
CHUNK_BYTES = 1 << 20
REPORT_SECONDS = 1.0
NOT_OFFERED = UnimplementedError("this worker does not offer it")


def vllm_service(worker: WorkerServicer) -> Service:
    add_to_server = vllm_grpc.add_VllmEngineServicer_to_server
    return Service(
        DESCRIPTOR, add_to_server, VllmEngineServicer(worker), background=frozenset({"SubscribeKvEvents"})
    )


class VllmEngineServicer(vllm_grpc.VllmEngineServicer):  # type: ignore[misc]  # its stubs are untyped
    """Every answer is WorkerService's in other words; so are its errors, deadlines and cancellation."""

    def __init__(self, worker: WorkerServicer) -> None:
        self._worker = worker

    async def Generate(
        self, request: vllm.GenerateRequest, context: Context
    ) -> AsyncIterator[vllm.GenerateResponse]:
        answer = Answer(request)
        async with aclosing(self._worker.Generate(read_request(request), context)) as responses:
            async for response in responses:
                for message in answer.add(response):
                    yield message

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        await self._worker.Abort(worker_pb2.AbortRequest(request_ids=request.request_ids), context)
        return vllm.AbortResponse()

    async def HealthCheck(
        self, request: vllm.HealthCheckRequest, context: Context
    ) -> vllm.HealthCheckResponse:
        load = await self._worker.GetLoad(worker_pb2.GetLoadRequest(), context)
        message = "draining" if load.is_draining else ""
        return vllm.HealthCheckResponse(healthy=not load.is_draining, message=message)

    async def GetModelInfo(
        self, request: vllm.GetModelInfoRequest, context: Context
    ) -> vllm.GetModelInfoResponse:
        model = await self._worker.GetModelInfo(worker_pb2.GetModelInfoRequest(), context)
        return vllm.GetModelInfoResponse(
            model_path=model.model_path,
            is_generation=True,
            max_context_length=model.max_model_len,
            max_req_input_len=model.max_model_len,
            vocab_size=model.vocab_size,
            served_model_name=model.served_model_name,
            tokenizer_path=model.model_path,
            model_type=model.model_type,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(
        self, request: vllm.GetServerInfoRequest, context: Context
    ) -> vllm.GetServerInfoResponse:
        server = await self._worker.GetServerInfo(worker_pb2.GetServerInfoRequest(), context)
        load = await self._worker.GetLoad(worker_pb2.GetLoadRequest(), context)
        return vllm.GetServerInfoResponse(
            active_requests=load.num_running + load.num_waiting,
            is_paused=load.is_draining,
            uptime_seconds=server.uptime_seconds,
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=server.block_size,
            model_dtype=server.dtype,
            max_num_seqs=server.max_num_seqs,
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        load = await self._worker.GetLoad(worker_pb2.GetLoadRequest(), context)
        server = await self._worker.GetServerInfo(worker_pb2.GetServerInfoRequest(), context)
        scheduler = vllm.SchedulerLoad(
            num_running_reqs=load.num_running,
            num_waiting_reqs=load.num_waiting,
            num_total_reqs=load.num_running + load.num_waiting,
            num_used_tokens=load.num_used_blocks * server.block_size,
            max_total_num_tokens=load.num_kv_blocks * server.block_size,
            token_usage=load.num_used_blocks / max(load.num_kv_blocks, 1),
            gen_throughput=load.generation_tokens_per_second,
            utilization=load.num_running / max(server.max_num_seqs, 1),
            max_running_requests=server.max_num_seqs,
            num_waiting_uncached_tokens=load.num_pending_prefill_tokens,
        )
        return vllm.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=server.version,
            dp_rank_count=1,
            loads=[scheduler],
        )

    async def GetTokenizer(
        self, request: smg.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[smg.GetTokenizerChunk]:
        """The tokenizer's files as a zip; its digest comes with the last chunk."""
        model = await self._worker.GetModelInfo(worker_pb2.GetModelInfoRequest(), context)
        bundle = await asyncio.to_thread(zip_tokenizer, Path(model.model_path))
        for start in range(0, len(bundle), CHUNK_BYTES):
            is_last = start + CHUNK_BYTES >= len(bundle)
            digest = hashlib.sha256(bundle).hexdigest() if is_last else ""
            yield smg.GetTokenizerChunk(data=bundle[start : start + CHUNK_BYTES], sha256=digest)

    async def Embed(self, request: vllm.EmbedRequest, context: Context) -> vllm.EmbedResponse:
        raise NOT_OFFERED

    async def FlushCache(self, request: smg.FlushCacheRequest, context: Context) -> smg.FlushCacheResponse:
        raise NOT_OFFERED

    async def StartProfile(self, request: smg.StartProfileRequest, context: Context) -> smg.ProfileResponse:
        raise NOT_OFFERED

    async def StopProfile(self, request: smg.StopProfileRequest, context: Context) -> smg.ProfileResponse:
        raise NOT_OFFERED

    async def SubscribeKvEvents(
        self, request: smg.SubscribeKvEventsRequest, context: Context
    ) -> AsyncIterator[smg.KvEventBatch]:
        """The load, every second: which blocks are cached where is not told."""
        for sample in itertools.count():
            load = await self._worker.GetLoad(worker_pb2.GetLoadRequest(), context)
            yield smg.KvEventBatch(timestamp=time.time(), load=self._load_record(load, sample))
            await asyncio.sleep(REPORT_SECONDS)

    @staticmethod
    def _load_record(load: worker_pb2.GetLoadResponse, sample: int) -> smg.EngineLoad:
        return smg.EngineLoad(
            running_requests=load.num_running,
            waiting_requests=load.num_waiting,
            waiting_uncached_tokens=load.num_pending_prefill_tokens,
            token_usage=load.num_used_blocks / max(load.num_kv_blocks, 1),
            gen_throughput=load.generation_tokens_per_second,
            engine_silence_ms=load.engine_silence_ms or None,
            sample=sample,
            load_only=True,
        )


def zip_tokenizer(folder: Path) -> bytes:
    """The files that make a tokenizer, without compression. Raises NotFoundError if there are none."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name in TOKENIZER_FILES[:2] for path in found):
        raise NotFoundError("the model's directory has no tokenizer.json and no tokenizer.model")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in found:
            archive.write(path, path.name)
    return buffer.getvalue()
