"""WorkerService over the engine loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing

from gpu_worker import messages
from gpu_worker.engine.errors import EngineDeadError, EngineDrainingError, RequestError
from gpu_worker.engine.loop import EngineLoop
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.metrics import RequestMetrics
from gpu_worker.tracing import record_phases
from protos.rpc import errors
from protos.rpc.interceptor import Context
from protos.rpc.many import generate_many
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`model` and `server` are the answers of GetModelInfo and GetServerInfo, fixed from the start;
    `expert_tokens` gives each layer's counts, by expert, if they are counted.
    """

    def __init__(
        self,
        engine: EngineLoop,
        model: worker_pb2.GetModelInfoResponse,
        server: worker_pb2.GetServerInfoResponse,
        metrics: RequestMetrics,
        expert_tokens: Callable[[], Mapping[int, Sequence[int]]] = dict,
    ) -> None:
        self._engine = engine
        self._model = model
        self._server = server
        self._metrics = metrics
        self._expert_tokens = expert_tokens
        self._ready_time = time.monotonic()

    async def Generate(
        self, request: worker_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[worker_pb2.GenerateResponse]:
        taken = messages.read_request(request, context.time_remaining())
        try:
            # Closing the outputs aborts the sequence: so a cancelled or expired call frees its blocks.
            async with (
                aclosing(self._engine.generate(taken)) as outputs,
                aclosing(self._respond(taken, outputs)) as responses,
            ):
                async for response in responses:
                    yield response
                    if response.HasField("delta") and request.min_delta_interval_ms:
                        # Meanwhile the engine's outputs gather, and the next delta has all of them.
                        await asyncio.sleep(request.min_delta_interval_ms / 1e3)
        except (RequestError, EngineDeadError, EngineDrainingError) as error:
            raise messages.service_error(error, taken, self._model.max_model_len) from error

    def GenerateMany(
        self, requests: AsyncIterator[worker_pb2.GenerateManyRequest], context: Context
    ) -> AsyncGenerator[worker_pb2.GenerateManyResponse]:
        return generate_many(self.Generate, requests)

    async def Abort(self, request: worker_pb2.AbortRequest, context: Context) -> worker_pb2.AbortResponse:
        aborted = [request_id for request_id in request.request_ids if await self._engine.abort(request_id)]
        return worker_pb2.AbortResponse(aborted_request_ids=aborted)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainResponse:
        timeout = request.timeout_seconds if request.HasField("timeout_seconds") else None
        if timeout is not None and not timeout >= 0:
            raise errors.InvalidArgumentError(
                f"timeout_seconds must be at least 0, got {timeout}", field="timeout_seconds"
            )
        return worker_pb2.DrainResponse(num_aborted=await self._engine.drain(timeout))

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: Context
    ) -> worker_pb2.GetModelInfoResponse:
        return self._model

    async def GetServerInfo(
        self, request: worker_pb2.GetServerInfoRequest, context: Context
    ) -> worker_pb2.GetServerInfoResponse:
        response = worker_pb2.GetServerInfoResponse(uptime_seconds=time.monotonic() - self._ready_time)
        response.MergeFrom(self._server)
        return response

    async def GetLoad(
        self, request: worker_pb2.GetLoadRequest, context: Context
    ) -> worker_pb2.GetLoadResponse:
        load = self._engine.load()
        return worker_pb2.GetLoadResponse(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_used_blocks=load.num_used_blocks,
            num_kv_blocks=load.num_blocks,
            num_pending_prefill_tokens=load.num_pending_prefill_tokens,
            generation_tokens_per_second=load.generation_tokens_per_second,
            engine_silence_ms=self._engine.silence_ms,
            is_draining=load.is_draining,
        )

    async def GetExpertTokens(
        self, request: worker_pb2.GetExpertTokensRequest, context: Context
    ) -> worker_pb2.GetExpertTokensResponse:
        counts = await asyncio.to_thread(self._expert_tokens)  # waits for the device
        layers = [worker_pb2.LayerExpertTokens(layer=i, tokens=tokens) for i, tokens in counts.items()]
        return worker_pb2.GetExpertTokensResponse(layers=layers)

    async def _respond(
        self, request: Request, outputs: AsyncIterator[StepOutput]
    ) -> AsyncGenerator[worker_pb2.GenerateResponse]:
        """The prompt's facts, then deltas, then the finish."""
        observer = self._metrics.start(request)
        is_first = True
        async for output in outputs:
            observer.add(output)
            if output.error is not None:
                raise _failure(output)
            if is_first:
                params = messages.effective_params(request, self._model.max_model_len)
                yield messages.prompt_info(output, params)
                is_first = False
            if output.timings is not None:
                record_phases(output.timings)
            for response in messages.responses(output):
                yield response


def _failure(output: StepOutput) -> errors.ServiceError:
    """What an output that carries an error is on the wire."""
    message = str(output.error)
    return (
        errors.DeadlineError(message) if output.finish_reason == "aborted" else errors.InternalError(message)
    )
