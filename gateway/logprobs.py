"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.responses import CompletionLogprobs, LogprobEntry, TokenEntry
from protos.wint2.common.v1.common_pb2 import PositionLogprobs, TokenLogprob

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LOWEST = -9999.0


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot come is told as very unlikely."""
    return max(logprob, LOWEST)


def logprob_entry(position: PositionLogprobs, texts: dict[int, str]) -> LogprobEntry:
    sampled = token_entry(position.sampled, texts)
    return {**sampled, "top_logprobs": [token_entry(candidate, texts) for candidate in position.top]}


def token_entry(candidate: TokenLogprob, texts: dict[int, str]) -> TokenEntry:
    text = texts[candidate.token_id]
    is_whole = REPLACEMENT not in text  # a token that is part of a character has no text of its own
    return {
        "token": text,
        "logprob": finite(candidate.logprob),
        "bytes": list(text.encode()) if is_whole else None,
    }


def no_logprobs() -> CompletionLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def text_logprobs(
    logprobs: Sequence[PositionLogprobs], texts: dict[int, str], offset: int
) -> tuple[CompletionLogprobs, int]:
    """The older API's parallel lists, beginning at `offset` of the text; and where they end."""
    body = no_logprobs()
    for position in logprobs:
        token = texts[position.sampled.token_id]
        body["tokens"].append(token)
        body["token_logprobs"].append(finite(position.sampled.logprob))
        candidates = (*position.top, position.sampled)
        body["top_logprobs"].append({texts[entry.token_id]: finite(entry.logprob) for entry in candidates})
        body["text_offset"].append(offset)
        offset += len(token)
    return body, offset


def prompt_logprobs(
    first_token_id: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]
) -> tuple[CompletionLogprobs, int]:
    """A prompt's parallel lists; nothing comes before its first token, so that it has no probability."""
    first = texts[first_token_id]
    body, end = text_logprobs(logprobs, texts, len(first))
    opening: CompletionLogprobs = {
        "tokens": [first],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
    return joined(opening, body), end


def joined(left: CompletionLogprobs, right: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": left["tokens"] + right["tokens"],
        "token_logprobs": left["token_logprobs"] + right["token_logprobs"],
        "top_logprobs": left["top_logprobs"] + right["top_logprobs"],
        "text_offset": left["text_offset"] + right["text_offset"],
    }


def position_table(position: PositionLogprobs, texts: dict[int, str]) -> dict[str, Any]:
    """By token id: log-probability, place among the likeliest if it is known, and text."""
    ranks = {entry.token_id: rank for rank, entry in enumerate(position.top, start=1)}
    return {
        str(entry.token_id): {
            "logprob": finite(entry.logprob),
            "rank": ranks.get(entry.token_id),
            "decoded_token": texts[entry.token_id],
        }
        for entry in (position.sampled, *position.top)
    }
