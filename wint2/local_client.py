"""The engine in this process, for the terminal commands that are given a checkpoint instead of a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.sequence import Request
from gpu_worker.llm_completions import PendingRequest
from gpu_worker.sampling_params import SamplingParams
from tokenizer_svc.tokenizer import load_tokenizer
from wint2.errors import CommandError

Payload = dict[str, Any]
SAMPLING = ("temperature", "top_p", "max_tokens", "seed", "stop")


class LocalClient:
    """Answers like `HttpClient`, one request at a time. Raises CommandError for wrong input."""

    def __init__(self, path: Path) -> None:
        self.model = path.name
        try:
            self._tokenizer = load_tokenizer(path)
            self._engine = build_engine(EngineArgs(model=path)).engine
        except ValueError as error:
            raise CommandError(str(error)) from error

    def chat(self, payload: Payload) -> Iterator[str]:
        """The pieces of the answer to a conversation."""
        try:
            text, token_ids = self._tokenizer.apply_chat_template(payload["messages"])
        except ValueError as error:
            raise CommandError(str(error)) from error
        return self._generate(text, token_ids, payload)

    def complete(self, payload: Payload) -> Iterator[str]:
        """The pieces of a completion."""
        prompt = payload["prompt"]
        return self._generate(prompt, self._tokenizer.encode(prompt), payload)

    def _generate(self, text: str, token_ids: list[int], payload: Payload) -> Iterator[str]:
        request = self._add(token_ids, {"max_tokens": None, **payload})
        pending = PendingRequest(request, text, self._tokenizer)
        completion = pending.result.outputs[0]
        try:
            while completion.finish_reason is None:
                shown = len(completion.text)
                for output in self._engine.step():
                    pending.take(output)
                yield completion.text[shown:]
        finally:
            self._engine.abort(request.request_id)
            self._engine.take_outputs()

    def _add(self, token_ids: list[int], payload: Payload) -> Request:
        options = {name: payload[name] for name in SAMPLING if name in payload}
        try:
            request = Request("terminal", token_ids, SamplingParams(**options))
            self._engine.add(request)
        except ValueError as error:
            raise CommandError(str(error)) from error
        return request
