"""The answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.logprobs import joined, no_logprobs, prompt_logprobs, text_logprobs
from gateway.requests import Started
from gateway.responses import CompletionLogprobs
from gateway.schemas import CompletionRequest
from gateway.views import Folded, Json, View
from protos.wint2.common.v1.common_pb2 import PositionLogprobs


class TextView(View):
    """`echoes` are the texts that the completions begin with."""

    chunk_object = "text_completion"
    answer_object = "text_completion"
    body: CompletionRequest

    def __init__(self, *args: Any, echoes: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    async def answer_choice(self, index: int, folded: Folded) -> Json:
        assert folded.started is not None
        assert folded.finished is not None
        logprobs = await self._prompt_part(folded.started)
        completion = await self._logprobs(index, folded.logprobs)
        if self.body.logprobs is not None:
            logprobs = joined(logprobs or no_logprobs(), completion or no_logprobs())  # type: ignore[arg-type]
        content = {"text": self._echo(index) + "".join(folded.text)} | self._prompt_token_ids(index)
        choice = self._choice(index, content, dict(logprobs) if logprobs else None)
        told = self._ids(folded.token_ids) | await self._prompt_logprobs(folded)
        return choice | self._ending(folded.finished) | told

    @property
    def _no_delta(self) -> Json:
        return {"text": ""}

    async def _opening(self, event: Started) -> Json | None:
        if not self._echoes and not self.body.return_token_ids:
            return None
        logprobs = await self._prompt_part(event)
        choice = self._choice(
            event.index, {"text": self._echo(event.index)}, dict(logprobs) if logprobs else None
        )
        return choice | self._prompt_token_ids(event.index) | self._ids(())

    def _delta(self, index: int, text: str) -> Json:
        return {"text": text} if text else {}

    def _last_delta(self, index: int) -> Json:
        return self._no_delta

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.request.num_choices] if self._echoes else ""

    async def _prompt_part(self, event: Started) -> CompletionLogprobs | None:
        """What an echo adds to the logprobs."""
        if not self._echoes or self.body.logprobs is None:
            return None
        first = self.prompts[event.index // self.request.num_choices].token_ids[0]
        texts = await self._texts_of(event.prompt_logprobs, first)
        body, self._offsets[event.index] = prompt_logprobs(first, event.prompt_logprobs, texts)
        return body

    def _prompt_token_ids(self, index: int) -> Json:
        prompt = self.prompts[index // self.request.num_choices]
        return {"prompt_token_ids": list(prompt.token_ids)} if self.body.return_token_ids else {}

    def _format(self, index: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]) -> Json:
        body, self._offsets[index] = text_logprobs(logprobs, texts, self._offsets.get(index, 0))
        return dict(body)
