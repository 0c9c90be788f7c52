"""The answers of /v1/chat/completions: content, reasoning and calls of tools told apart."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gateway.call_reader import CallPiece
from gateway.chat_parser import END_THINK, RESPONSE, THINK, ChatParser, ChatSyntax, Parts
from gateway.chat_schemas import ChatCompletionRequest
from gateway.logprobs import logprob_entry
from gateway.requests import EncodedPrompt, Finished, Started
from gateway.views import Folded, Json, View
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import PositionLogprobs


def chat_syntax(body: ChatCompletionRequest, prompt: EncodedPrompt, template: str) -> ChatSyntax:
    """What to look for in answers to this prompt. The model was told of tools, or the request is refused."""
    text = prompt.text or ""
    functions = [tool.function.name for tool in body.offered_tools]
    if missing := [name for name in functions if name not in text]:
        raise InvalidArgumentError(
            f"the model's chat template does not tell it of tools ({missing[0]} is not in the prompt)",
            field="tools",
            reason="UNSUPPORTED_PARAMETER",
        )
    has_reasoning = END_THINK in template and body.include_reasoning is not False
    return ChatSyntax(
        has_reasoning=has_reasoning,
        has_response_tags=RESPONSE in template,
        opens_in_reasoning=has_reasoning and text.rstrip().endswith(THINK),
        functions=frozenset(functions),
        is_forced_call=bool(body.forced_tools),
    )


class ChatView(View):
    """Every choice has a parser of its own, unless all text is content."""

    chunk_object = "chat.completion.chunk"
    answer_object = "chat.completion"
    body: ChatCompletionRequest

    def __init__(self, *args: Any, syntax: ChatSyntax) -> None:
        super().__init__(*args)
        self._syntax = syntax
        self._parsers: dict[int, ChatParser] = {}
        self._num_calls: dict[int, int] = {}

    def prompt_ids(self) -> Json:
        return {"prompt_token_ids": list(self.prompts[0].token_ids)} if self.body.return_token_ids else {}

    async def prompt_facts(self, folded: Folded) -> Json:
        return await self._prompt_logprobs(folded)

    async def answer_choice(self, index: int, folded: Folded) -> Json:
        assert folded.finished is not None
        text = "".join(folded.text)
        message = {"role": "assistant", "content": text, "refusal": None}
        if not self._syntax.is_plain:
            message |= self._parsed(index, text)
        choice = self._choice(index, {"message": message}, await self._logprobs(index, folded.logprobs))
        return choice | self._ending(folded.finished) | self._ids(folded.token_ids)

    def _parsed(self, index: int, text: str) -> Json:
        parser = ChatParser(self._syntax)
        parts = parser.feed(text) + parser.finish()
        calls = self._call_entries(index, parts)
        message: Json = {"content": parts.content or (None if calls else "")}
        if self._syntax.has_reasoning:
            message["reasoning_content"] = parts.reasoning or None
        return message | ({"tool_calls": calls} if calls else {})

    @property
    def _no_delta(self) -> Json:
        return {"delta": {}}

    async def _opening(self, event: Started) -> Json:
        return self._choice(event.index, {"delta": {"role": "assistant", "content": ""}}, None)

    def _delta(self, index: int, text: str) -> Json:
        if self._syntax.is_plain:
            return {"delta": {"content": text}} if text else {}
        parser = self._parsers.setdefault(index, ChatParser(self._syntax))
        return self._parts_delta(index, parser.feed(text))

    def _last_delta(self, index: int) -> Json:
        parser = self._parsers.get(index)
        return (self._parts_delta(index, parser.finish()) if parser else {}) or self._no_delta

    def _parts_delta(self, index: int, parts: Parts) -> Json:
        calls = [entry for piece in parts.pieces if (entry := self._piece_entry(index, piece))]
        told = {"content": parts.content, "reasoning_content": parts.reasoning, "tool_calls": calls}
        delta = {name: value for name, value in told.items() if value}
        return {"delta": delta} if delta else {}

    def _piece_entry(self, index: int, piece: CallPiece) -> Json | None:
        """The beginning of a call, or more of its arguments."""
        is_new = piece.name is not None
        number = self._num_calls[index] = self._num_calls.get(index, 0) + is_new
        if number > self._max_calls:
            return None
        head = {"id": call_id(), "type": "function"} if is_new else {}
        function = {"name": piece.name} if is_new else {}
        return {"index": number - 1, **head, "function": {**function, "arguments": piece.arguments}}

    @property
    def _max_calls(self) -> float:
        """Without parallel calls only a choice's first one counts."""
        return 1 if self.body.parallel_tool_calls is False else math.inf

    def _call_entries(self, index: int, parts: Parts) -> list[Json]:
        self._num_calls[index] = len(parts.calls)
        entries = [{"id": call_id(), "type": "function", "function": asdict(call)} for call in parts.calls]
        return entries[:1] if self.body.parallel_tool_calls is False else entries

    def _ending(self, event: Finished) -> Json:
        ending = super()._ending(event)
        if self._num_calls.get(event.index) and ending["finish_reason"] == "stop":
            ending["finish_reason"] = "tool_calls"
        return ending

    def _format(self, index: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]) -> Json:
        return {"content": [logprob_entry(position, texts) for position in logprobs]}


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
