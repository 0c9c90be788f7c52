"""A client of the OpenAI-shaped HTTP API, as small as the terminal commands need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import httpx

from wint2.errors import EXIT_FAILED, CommandError

CONNECT_SECONDS = 5.0
Payload = dict[str, Any]


class HttpClient:
    """Streams answers from a server. Raises CommandError with the server's own words."""

    def __init__(self, url: str, api_key: str = "", model: str = "") -> None:
        root = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._model = model
        self._client = httpx.Client(base_url=f"{root}/v1", headers=headers, timeout=timeout)

    @cached_property
    def model(self) -> str:
        """The name asked for, or else that of the first model the server offers."""
        return self._model or self._first_model()

    def chat(self, payload: Payload) -> Iterator[str]:
        """The pieces of the answer to a conversation."""
        for choice in self._choices("chat/completions", payload):
            yield choice["delta"].get("content") or ""

    def complete(self, payload: Payload) -> Iterator[str]:
        """The pieces of a completion."""
        for choice in self._choices("completions", payload):
            yield choice["text"]

    def _first_model(self) -> str:
        try:
            response = self._client.get("models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise CommandError(_message(response), EXIT_FAILED)
        models = response.json()["data"]
        if not models:
            raise CommandError(f"{self._client.base_url} has no model to offer yet", EXIT_FAILED)
        return str(models[0]["id"])

    def _choices(self, path: str, payload: Payload) -> Iterator[Payload]:
        for event in self._events(path, {**payload, "stream": True}):
            if "error" in event:
                raise CommandError(event["error"]["message"], EXIT_FAILED)
            yield from event["choices"]

    def _events(self, path: str, payload: Payload) -> Iterator[Payload]:
        try:
            with self._client.stream("POST", path, json=payload) as response:
                if response.is_error:
                    response.read()
                    raise CommandError(_message(response), EXIT_FAILED)
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield json.loads(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> CommandError:
        return CommandError(f"{self._client.base_url}: {error} (is `wint2 serve` running?)", EXIT_FAILED)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code} from {response.url}: {response.text[:200]}"
