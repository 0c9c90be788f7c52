"""The access log: a line a request, with what it cost and how fast it was answered."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from opentelemetry import trace

from gateway.requests import Event, Finished, TextPiece
from protos.rpc.errors import ServiceError

logger = logging.getLogger("gateway.access")

SPAN_ATTRIBUTES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "time_to_first_token_seconds": "gen_ai.server.time_to_first_token",
}


@dataclass
class Access:
    """What the line says of a request beyond its status; whoever answers the request fills it in."""

    started: float = field(default_factory=time.perf_counter)
    num_prompt_tokens: int = 0
    first_token_at: float | None = None
    _tokens: dict[int, int] = field(default_factory=dict)

    @property
    def num_completion_tokens(self) -> int:
        return sum(self._tokens.values())

    def on_event(self, event: Event) -> None:
        """Counts an event on its way to the client."""
        if isinstance(event, TextPiece):
            self._tokens[event.index] = self._tokens.get(event.index, 0) + len(event.token_ids)
            self.first_token_at = self.first_token_at or time.perf_counter()
        elif isinstance(event, Finished):
            self._tokens[event.index] = event.usage.completion_tokens

    def log(self, what: str, outcome: str) -> None:
        """Writes the line; in JSON logs its figures are fields."""
        figures = self.figures(time.perf_counter())
        logger.info("%s %s %s", what, outcome, describe(figures), extra={"fields": figures})

    def attributes(self) -> dict[str, float]:
        """The figures in OpenTelemetry's words."""
        figures = self.figures(time.perf_counter())
        return {SPAN_ATTRIBUTES[name]: value for name, value in figures.items() if name in SPAN_ATTRIBUTES}

    def figures(self, now: float) -> dict[str, float]:
        """Only what there is to tell of this request."""
        figures: dict[str, float] = {"duration_seconds": round(now - self.started, 4)}
        if self.num_prompt_tokens:
            figures["prompt_tokens"] = self.num_prompt_tokens
            figures["completion_tokens"] = self.num_completion_tokens
        if self.first_token_at is not None:
            figures["time_to_first_token_seconds"] = round(self.first_token_at - self.started, 4)
            if self.num_completion_tokens > 1 and now > self.first_token_at:
                speed = (self.num_completion_tokens - 1) / (now - self.first_token_at)
                figures["tokens_per_second"] = round(speed, 1)
        return figures


def describe(figures: dict[str, float]) -> str:
    """`1.23 s, 17 + 64 tokens, first after 45 ms, 54.0 tokens/s`"""
    parts = [f"{figures['duration_seconds']:.2f} s"]
    if "prompt_tokens" in figures:
        parts.append(f"{figures['prompt_tokens']} + {figures['completion_tokens']} tokens")
    if "time_to_first_token_seconds" in figures:
        parts.append(f"first after {figures['time_to_first_token_seconds'] * 1e3:.0f} ms")
    if "tokens_per_second" in figures:
        parts.append(f"{figures['tokens_per_second']:.1f} tokens/s")
    return ", ".join(parts)


@contextlib.contextmanager
def logged(what: str) -> Iterator[Access]:
    """A gRPC call's access, and its line with the call's status when it ends."""
    access, outcome = Access(), "CANCELLED"
    try:
        yield access
        outcome = "OK"
    except ServiceError as error:
        outcome = error.code.name
        raise
    except Exception:
        outcome = "INTERNAL"
        raise
    finally:
        trace.get_current_span().set_attributes(access.attributes())
        access.log(what, outcome)
