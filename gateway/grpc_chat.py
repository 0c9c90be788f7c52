"""Conversations over gRPC: read by the HTTP API's schema, reasoning and calls of tools told apart."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from gateway.chat_parser import ChatParser, ChatSyntax, Parts
from gateway.chat_schemas import ChatCompletionRequest
from gateway.grpc_messages import ChatRequest, event_field, text_request
from gateway.http_errors import from_validation
from gateway.requests import Event, Finished, TextPiece, TextRequest
from gateway.settings import GatewaySettings
from gateway.structured import structured_output
from gateway.translate import template
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import SamplingParams
from protos.wint2.gateway.v1 import gateway_pb2 as pb

Json = dict[str, Any]

TOOL_CHOICES: dict[pb.ToolChoice.ValueType, str] = {
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_REQUIRED: "required",
}


def read_chat(
    request: ChatRequest, time_remaining: float | None, settings: GatewaySettings
) -> tuple[ChatCompletionRequest, TextRequest]:
    """`time_remaining` is the call's deadline, in seconds from now. Raises InvalidArgumentError."""
    body = read_body(request)
    prompt = template(body.messages, body, body.offered_tools, {})
    taken = text_request("chatcmpl", request, prompt, time_remaining, settings)
    if taken.sampling_params.HasField("structured_output"):
        check_alone(body)
    taken.sampling_params.MergeFrom(SamplingParams(structured_output=structured_output(body)))
    return body, taken


def check_alone(body: ChatCompletionRequest) -> None:
    """The form of an answer leaves no room for calls or thoughts."""
    field = "sampling_params.structured_output"
    if body.offered_tools:
        message = "cannot be combined with tools, unless tool_choice is TOOL_CHOICE_NONE"
        raise InvalidArgumentError(message, field=field)
    if body.thinking_field is not None:
        raise InvalidArgumentError(f"cannot be combined with {body.thinking_field}", field=field)


def read_body(request: ChatRequest) -> ChatCompletionRequest:
    """What makes the prompt and the form of the answer. Raises InvalidArgumentError naming the field."""
    if not request.messages:
        raise InvalidArgumentError("at least one message is required", field="messages")
    fields: Json = {
        "messages": [read_message(message) for message in request.messages],
        "tools": [read_tool(*numbered) for numbered in enumerate(request.tools)] or None,
        "tool_choice": TOOL_CHOICES.get(request.tool_choice),
        "chat_template_kwargs": MessageToDict(request.chat_template_kwargs),
    }
    for name in "parallel_tool_calls", "thinking_token_budget":
        if request.HasField(name):
            fields[name] = getattr(request, name)
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        found = from_validation(error.errors())
        raise InvalidArgumentError(found.message, field=found.param) from error


def read_message(message: pb.ChatMessage) -> Json:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        "reasoning_content": message.reasoning if message.HasField("reasoning") else None,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id or None,
    }


def read_tool(index: int, tool: pb.Tool) -> Json:
    try:
        parameters = json.loads(tool.parameters_json or "null")
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("is not JSON", field=f"tools.{index}.parameters_json") from error
    function = {"name": tool.name, "description": tool.description or None, "parameters": parameters}
    return {"type": "function", "function": {name: value for name, value in function.items() if value}}


class Answers:
    """Each event as fields of a stream's messages; every choice has a parser, unless all text is content."""

    def __init__(self, syntax: ChatSyntax, *, is_parallel: bool = True) -> None:
        self._syntax = syntax
        self._is_parallel = is_parallel
        self._parsers: dict[int, ChatParser] = {}
        self._has_called: set[int] = set()

    def add(self, event: Event) -> Iterator[Json]:
        if self._syntax.is_plain:
            yield event_field(event)
        elif isinstance(event, TextPiece):
            parts = self._parser(event.index).feed(event.text)
            yield {"delta": self._delta(event.index, parts, event)}
        else:
            if isinstance(event, Finished):
                yield from self._rest(event.index)
            yield event_field(event)

    def _parser(self, index: int) -> ChatParser:
        return self._parsers.setdefault(index, ChatParser(self._syntax))

    def _rest(self, index: int) -> Iterator[Json]:
        """What was held back until the end, if anything."""
        parts = self._parser(index).finish()
        if parts != Parts():
            yield {"delta": self._delta(index, parts, TextPiece(index, "", ()))}

    def _delta(self, index: int, parts: Parts, piece: TextPiece) -> pb.TextDelta:
        return pb.TextDelta(
            index=index,
            text=parts.content,
            reasoning=parts.reasoning,
            tool_calls=self._calls(index, parts),
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
        )

    def _calls(self, index: int, parts: Parts) -> list[pb.ToolCall]:
        """Without parallel calls only a choice's first one counts."""
        calls = parts.calls if self._is_parallel else parts.calls[: index not in self._has_called]
        if calls:
            self._has_called.add(index)
        return [
            pb.ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", name=call.name, arguments_json=call.arguments)
            for call in calls
        ]
