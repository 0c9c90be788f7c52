"""The OpenAI-compatible HTTP API: parse, run the pipeline, answer in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import responses, translate
from gateway.access import Access
from gateway.chat_schemas import ChatCompletionRequest
from gateway.chat_view import ChatView, chat_syntax
from gateway.http_errors import from_service_error, named_as_asked
from gateway.metrics import GatewayMetrics
from gateway.pipeline import Pipeline
from gateway.readiness import Readiness
from gateway.requests import EncodedPrompt, Event, Finished, Started, TextRequest
from gateway.schemas import CommonRequest, CompletionRequest
from gateway.settings import GatewaySettings
from gateway.sse import DONE, EventStream, sse, until_disconnect
from gateway.structured import wire_fields
from gateway.text_view import TextView
from gateway.thinking import thinking_limit
from gateway.views import Folded, View
from protos.rpc.errors import NotFoundError, ServiceError, UnavailableError
from protos.wint2.common.v1.common_pb2 import FINISH_REASON_LENGTH, Usage
from protos.wint2.gateway.v1.gateway_pb2 import Model


class OpenAiApi:
    """The handlers. FastAPI reads their signatures; errors are raised, never returned."""

    def __init__(
        self, pipeline: Pipeline, readiness: Readiness, metrics: GatewayMetrics, settings: GatewaySettings
    ) -> None:
        self._pipeline = pipeline
        self._readiness = readiness
        self._metrics = metrics
        self._settings = settings
        self._limits = settings.limits()

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation."""
        text_request = translate.chat(body, self._deadline(), self._limits)
        return await until_disconnect(request.receive, self._chat(body, text_request, request.state.access))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Completes prompts."""
        text_request = translate.completion(body, self._deadline(), self._limits)
        return await until_disconnect(request.receive, self._text(body, text_request, request.state.access))

    async def models(self) -> Response:
        """The models that can be asked for now."""
        return JSONResponse({"object": "list", "data": [model_body(m) for m in self._readiness.models()]})

    async def model(self, model: str) -> Response:
        """One model."""
        found = [offered for offered in self._readiness.models() if offered.id == model]
        if not found:
            raise NotFoundError(
                f"The model {model!r:.200} does not exist", field="model", reason="MODEL_NOT_FOUND"
            )
        return JSONResponse(model_body(found[0]))

    async def ready(self) -> Response:
        """200 while requests can be served; 503 and the reasons while not."""
        reasons = self._readiness.reasons
        body: responses.Health = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        headers = {"retry-after": "1"} if reasons else None
        return JSONResponse(body, 503 if reasons else 200, headers)

    async def live(self) -> Response:
        """200 while this process runs."""
        return JSONResponse({"status": "alive"})

    async def version(self) -> Response:
        return JSONResponse({"version": version("wint2")})

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(self._metrics.published), media_type=CONTENT_TYPE_LATEST)

    async def _chat(self, body: ChatCompletionRequest, request: TextRequest, access: Access) -> Response:
        tokenizer = self._pipeline.tokenizer
        prompts = await self._pipeline.encode(request)
        template = body.chat_template or await tokenizer.chat_template()
        syntax = chat_syntax(body, prompts[0], template)
        request = replace(request, thinking=await thinking_limit(body, prompts[0], template, tokenizer))
        if not syntax.is_plain and body.skip_special_tokens is None:
            # Tags may be special tokens of the vocabulary.
            request = replace(request, skip_special_tokens=False)
        view = ChatView(body, request, prompts, self._model(body), tokenizer.token_texts, syntax=syntax)
        return await self._answer(view, access)

    async def _text(self, body: CompletionRequest, request: TextRequest, access: Access) -> Response:
        prompts = await self._pipeline.encode(request)
        echoes = await self._texts(prompts) if body.echo else ()
        texts = self._pipeline.tokenizer.token_texts
        view = TextView(body, request, prompts, self._model(body), texts, echoes=echoes)
        return await self._answer(view, access)

    async def _answer(self, view: View, access: Access) -> Response:
        access.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in view.prompts)
        events = self._pipeline.run(view.request, view.prompts)
        if isinstance(view.body, CompletionRequest) and view.body.is_echo_only:
            events = without_completion(events)
        with named_as_asked(wire_fields(view.body)):
            if not view.body.stream:
                return JSONResponse(await fold(view, events, access))
            # Until the first event there is no status line: errors before it are real HTTP errors.
            first = await anext(events)
        return EventStream(stream(view, first, events, access), self._settings.write_timeout)

    async def _texts(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        decode = self._pipeline.tokenizer.decode
        return [
            await decode(prompt.token_ids, skip_special_tokens=False) if prompt.text is None else prompt.text
            for prompt in prompts
        ]

    def _deadline(self) -> float:
        if self._readiness.is_draining:
            raise UnavailableError("the server is draining", reason="DRAINING", retry_after_seconds=5)
        return time.monotonic() + self._settings.request_timeout

    def _model(self, body: CommonRequest) -> str:
        return body.model or next((model.id for model in self._readiness.models()), "")


async def without_completion(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """The same answer as if it had ended with the prompt."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                usage = Usage(prompt_tokens=event.usage.prompt_tokens)
                yield replace(event, reason=FINISH_REASON_LENGTH, usage=usage, stop_token_id=None)
            elif isinstance(event, Started):
                yield event


def count(event: Event, view: View, access: Access) -> None:
    """For the answer's usage, and for the access line."""
    view.tally.on_event(event)
    access.on_event(event)


async def fold(view: View, events: AsyncGenerator[Event], access: Access) -> dict[str, Any]:
    """The whole answer."""
    choices: dict[int, Folded] = {}
    async with aclosing(events):
        async for event in events:
            count(event, view, access)
            choices.setdefault(event.index, Folded()).on_event(event)
    bodies = [await view.answer_choice(index, choices[index]) for index in sorted(choices)]
    answer = {"object": view.answer_object, "choices": bodies, "usage": view.tally.body()}
    return {**view.head, **answer, **view.prompt_ids(), **await view.prompt_facts(choices[0])}


async def stream(
    view: View, first: Event, events: AsyncGenerator[Event], access: Access
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events: chunks, the usage if it was asked for, or the error; then [DONE]."""
    options = view.body.stream_options
    head = {**view.head, "object": view.chunk_object}
    prompt_ids = view.prompt_ids()
    is_usage_always = bool(options and options.continuous_usage_stats)
    num_open = len(view.prompts) * view.request.num_choices
    tail = b""
    try:
        async with aclosing(events):
            event: Event | None = first
            while event is not None:
                count(event, view, access)
                choice = await view.chunk_choice(event)
                if choice is not None:
                    usage = {"usage": view.tally.body() if is_usage_always else None} if options else {}
                    tail += sse({**head, "choices": [choice], **usage, **prompt_ids})
                    prompt_ids = {}
                num_open -= isinstance(event, Finished)
                if tail and num_open:
                    yield tail
                    tail = b""
                event = await anext(events, None)
        if options and options.include_usage:
            tail += sse({**head, "choices": [], "usage": view.tally.body()})
    except ServiceError as error:
        tail += sse(from_service_error(error).body)
    yield tail + DONE


def model_body(model: Model) -> responses.ModelBody:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created.seconds,
        "owned_by": "wint2",
        "max_model_len": model.max_model_len,
        "num_workers": model.num_workers,
        "quantization": model.quantization,
    }


async def require_json(request: Request) -> None:
    """415 for a body that says it is something else."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HTTPException(415)
