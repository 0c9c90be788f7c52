"""GatewayService: the same requests as over HTTP, on the same pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from gateway import grpc_messages as messages
from gateway.access import logged
from gateway.chat_parser import ChatSyntax
from gateway.chat_schemas import ChatCompletionRequest
from gateway.chat_view import chat_syntax
from gateway.deadline import within
from gateway.grpc_chat import Answers, read_chat
from gateway.pipeline import Pipeline
from gateway.readiness import Readiness
from gateway.requests import TextRequest
from gateway.settings import GatewaySettings
from gateway.thinking import thinking_limit
from protos.rpc.interceptor import Context
from protos.rpc.server import Service
from protos.wint2.common.v1.common_pb2 import TokenIds
from protos.wint2.gateway.v1 import gateway_pb2 as pb
from protos.wint2.gateway.v1 import gateway_pb2_grpc

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GatewayService"]


def gateway_service(pipeline: Pipeline, readiness: Readiness, settings: GatewaySettings) -> Service:
    servicer = GatewayServicer(pipeline, readiness, settings)
    return Service(DESCRIPTOR, gateway_pb2_grpc.add_GatewayServiceServicer_to_server, servicer)


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, pipeline: Pipeline, readiness: Readiness, settings: GatewaySettings) -> None:
        self._pipeline = pipeline
        self._readiness = readiness
        self._settings = settings

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        taken = messages.generate(request, context.time_remaining(), self._settings)
        async with aclosing(self._run(taken)) as fields:
            return pb.GenerateResponse(completions=messages.completions([each async for each in fields]))

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        taken = messages.generate(request, context.time_remaining(), self._settings)
        async with aclosing(self._run(taken)) as fields:
            async for each in fields:
                yield pb.GenerateStreamResponse(**each)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.ChatResponse:
        body, taken = read_chat(request, context.time_remaining(), self._settings)
        async with aclosing(self._run(taken, body)) as fields:
            return pb.ChatResponse(completions=messages.completions([each async for each in fields]))

    async def ChatStream(
        self, request: pb.ChatStreamRequest, context: Context
    ) -> AsyncIterator[pb.ChatStreamResponse]:
        body, taken = read_chat(request, context.time_remaining(), self._settings)
        async with aclosing(self._run(taken, body)) as fields:
            async for each in fields:
                yield pb.ChatStreamResponse(**each)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=self._readiness.models())

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        messages.check_batch(request.texts, "texts")
        token_ids = await self._pipeline.tokenizer.encode(
            request.texts,
            add_special_tokens=not request.HasField("add_special_tokens") or request.add_special_tokens,
            timeout=self._timeout(context),
        )
        return pb.TokenizeResponse(token_ids=[TokenIds(ids=ids) for ids in token_ids])

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        messages.check_batch(request.token_ids, "token_ids")
        is_skipping = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        tokenizer = self._pipeline.tokenizer
        texts = asyncio.gather(
            *(tokenizer.decode(run.ids, skip_special_tokens=is_skipping) for run in request.token_ids)
        )
        return pb.DetokenizeResponse(texts=await within(self._timeout(context), texts))

    async def _run(
        self, request: TextRequest, body: ChatCompletionRequest | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Fields of a stream's messages; the access line when they end."""
        with logged(request.request_id) as access:
            prompts = await self._pipeline.encode(request)
            access.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            syntax = ChatSyntax()
            if body is not None:
                template = await self._pipeline.tokenizer.chat_template()
                syntax = chat_syntax(body, prompts[0], template)
                thinking = await thinking_limit(body, prompts[0], template, self._pipeline.tokenizer)
                # Tags may be special tokens of the vocabulary.
                request = replace(request, thinking=thinking, skip_special_tokens=syntax.is_plain)
            answers = Answers(syntax, is_parallel=body is None or body.parallel_tool_calls is not False)
            async with aclosing(self._pipeline.run(request, prompts)) as events:
                async for event in events:
                    access.on_event(event)
                    for fields in answers.add(event):
                        yield fields

    def _timeout(self, context: Context) -> float:
        remaining = context.time_remaining()
        most = self._settings.request_timeout
        return most if remaining is None else min(most, remaining)
