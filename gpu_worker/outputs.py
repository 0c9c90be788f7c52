"""What `LLM.generate` returns: one result for each prompt, readable as FastDeploy's and as vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpu_worker.engine.sequence import FinishReason, PositionLogprobs, Timings


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability and, if it was one of the likeliest, its rank from 1."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `stop_reason` is the stop token's id or the stop string that ended it.

    `reasoning_content` is always None: an LLM returns the text as the model wrote it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    reasoning_content: str | None = None


class CompletionOutputs(list[CompletionOutput]):
    """The `n` completions of a prompt; the list has the attributes of the first.

    So `output.outputs.text` (FastDeploy: one object) and `output.outputs[0].text` (vLLM, a list) are one.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self[0], name)


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions; `error_code` is 200, or 500 and `error_msg` says why.

    `prompt_logprobs` has an entry for each prompt token; the first is None, for nothing comes before it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: CompletionOutputs
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    metrics: Timings | None = None
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None


def read_logprobs(positions: list[PositionLogprobs]) -> list[dict[int, Logprob]]:
    """By position, then by token id: the sampled token and the likeliest ones."""
    return [
        {position.sampled.token_id: Logprob(position.sampled.logprob)}
        | {top.token_id: Logprob(top.logprob, rank) for rank, top in enumerate(position.top, start=1)}
        for position in positions
    ]
