"""GatewayService: the same requests as over HTTP, on the same pipeline."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from google.protobuf.struct_pb2 import Struct

from gateway.fields import MAX_STOPS
from gateway.pipeline import Pipeline
from gateway.readiness import Readiness
from gateway.requests import Event, Finished, Prompt, TextPiece, TextRequest
from gateway.settings import GatewaySettings
from protos.rpc.errors import InvalidArgumentError
from protos.rpc.interceptor import Context
from protos.rpc.server import Service
from protos.wint2.gateway.v1 import gateway_pb2 as pb
from protos.wint2.gateway.v1 import gateway_pb2_grpc
from protos.wint2.tokenizer.v1.tokenizer_pb2 import ApplyChatTemplateRequest

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GatewayService"]


def gateway_service(pipeline: Pipeline, readiness: Readiness, settings: GatewaySettings) -> Service:
    servicer = GatewayServicer(pipeline, readiness, settings.request_timeout)
    return Service(DESCRIPTOR, gateway_pb2_grpc.add_GatewayServiceServicer_to_server, servicer)


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, pipeline: Pipeline, readiness: Readiness, request_timeout: float) -> None:
        self._pipeline = pipeline
        self._readiness = readiness
        self._request_timeout = request_timeout

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidArgumentError("a prompt is required: text or token_ids", field="prompt")
        prompt: Prompt = request.text if kind == "text" else list(request.token_ids.ids)
        if not prompt:
            raise InvalidArgumentError("the prompt is empty", field=kind)
        async with aclosing(self._run("cmpl", request, prompt, context)) as events:
            async for event in events:
                yield pb.GenerateStreamResponse(**event)

    async def ChatStream(
        self, request: pb.ChatStreamRequest, context: Context
    ) -> AsyncIterator[pb.ChatStreamResponse]:
        if not request.messages:
            raise InvalidArgumentError("at least one message is required", field="messages")
        template = ApplyChatTemplateRequest(
            messages=[as_struct(*numbered) for numbered in enumerate(request.messages)],
            template_kwargs=request.chat_template_kwargs,
        )
        async with aclosing(self._run("chatcmpl", request, template, context)) as events:
            async for event in events:
                yield pb.ChatStreamResponse(**event)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=self._readiness.models())

    async def _run(
        self,
        kind: str,
        request: pb.GenerateStreamRequest | pb.ChatStreamRequest,
        prompt: Prompt,
        context: Context,
    ) -> AsyncGenerator[dict[str, Any]]:
        check_stop(request.stop)
        allowed = context.time_remaining()
        text_request = TextRequest(
            request_id=f"{kind}-{uuid.uuid4().hex}",
            model=request.model,
            prompts=[prompt],
            deadline=time.monotonic() + min(self._request_timeout, allowed or self._request_timeout),
            sampling_params=request.sampling_params,
            stop=list(request.stop),
            include_stop=request.include_stop,
            priority=request.priority,
            cache_salt=request.cache_salt if request.HasField("cache_salt") else None,
        )
        prompts = await self._pipeline.encode(text_request)
        async with aclosing(self._pipeline.run(text_request, prompts)) as events:
            async for event in events:
                if fields := as_fields(event):
                    yield fields


def as_fields(event: Event) -> dict[str, Any]:
    """The event as a field of a response's oneof; nothing for what this API does not tell."""
    if isinstance(event, TextPiece):
        delta = pb.TextDelta(text=event.text, token_ids=event.token_ids, logprobs=event.logprobs)
        return {"delta": delta}
    if not isinstance(event, Finished):
        return {}
    finish = pb.CompletionFinish(
        reason=event.reason,
        matched_stop=event.matched_stop,
        stop_token_id=event.stop_token_id,
        usage=event.usage,
        timings=event.timings,
    )
    return {"finish": finish}


def as_struct(index: int, message: pb.ChatMessage) -> Struct:
    if message.role not in ("system", "user", "assistant"):
        raise InvalidArgumentError(
            f'is "{message.role:.50}"; it must be "system", "user" or "assistant"',
            field=f"messages.{index}.role",
        )
    result = Struct()
    result.update({"role": message.role, "content": message.content})
    return result


def check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOPS:
        raise InvalidArgumentError(f"has {len(stop)} strings; at most {MAX_STOPS} are taken", field="stop")
    if not all(stop):
        raise InvalidArgumentError("holds an empty string", field="stop")
