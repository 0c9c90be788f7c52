"""Log-probabilities of tokens and of their likeliest rivals, for the requests that ask.

They are the model's own: taken from the logits before the sampler edits them.
S sequences that are sampled, R rows of logits that are asked about, T tokens of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.engine.scheduler import ScheduledStep
from gpu_worker.engine.sequence import PositionLogprobs, Sequence, TokenLogprob
from gpu_worker.engine.sequence_table import Rows, SequenceTable

# Prompt positions scored at a time: bounds the memory that their logits take.
_MAX_ROWS = 256


class LogprobReader:
    """The distributions of some of a step's positions, kept until their tokens are drawn."""

    def __init__(self, logits_SV: torch.Tensor, positions: Rows, num_top_S: Rows) -> None:
        self._positions = positions
        self._num_top_S = num_top_S
        at = torch.from_numpy(positions).to(logits_SV.device)
        self._logprobs_RV = torch.log_softmax(logits_SV[at], dim=-1)

    def read(self, token_ids: Rows) -> dict[int, PositionLogprobs]:
        """By position in S: the drawn token's log-probability and as many top ones as asked for."""
        at = self._positions
        entries = _entries(self._logprobs_RV, token_ids[at].tolist(), self._num_top_S[at].tolist())
        return dict(zip(at.tolist(), entries, strict=True))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Rows [first_row, first_row + count) of T: their logits are about the prompt's next tokens to score."""

    sequence: Sequence
    first_row: int
    count: int


class PromptScorer:
    """Gives prompts their log-probabilities, as the steps compute them chunk by chunk.

    The logits of the token at position p are about position p + 1, so the first token has none, and an entry
    i of `Sequence.prompt_logprobs` comes from position i.
    """

    def __init__(self, table: SequenceTable, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._table = table
        self._logits = logits
        self._unscored: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """A sequence that has just been given a row."""
        if sequence.has_unscored_prompt and sequence not in self._unscored:
            self._unscored.append(sequence)

    def find(self, step: ScheduledStep) -> list[_Stretch]:
        """What the step computes of prompts that are to be scored."""
        self._unscored = [s for s in self._unscored if s.row is not None and s.has_unscored_prompt]
        return [stretch for sequence in self._unscored for stretch in self._stretch(sequence, step)]

    def score(self, stretches: Iterable[_Stretch], hidden_TD: torch.Tensor) -> None:
        """Takes the hidden states of all tokens of the step."""
        for stretch in stretches:
            for start in range(0, stretch.count, _MAX_ROWS):
                first = stretch.first_row + start
                count = min(_MAX_ROWS, stretch.count - start)
                self._score(stretch.sequence, hidden_TD[first : first + count])

    def _stretch(self, sequence: Sequence, step: ScheduledStep) -> Iterator[_Stretch]:
        (index,) = np.flatnonzero(step.rows == sequence.row).tolist()
        count = int(step.num_scheduled[index])
        start = int(self._table.num_computed[sequence.row])
        first, end = (
            max(start, len(sequence.prompt_logprobs)),
            min(start + count, sequence.num_prompt_tokens - 1),
        )
        if first < end:
            yield _Stretch(sequence, int(step.num_scheduled[:index].sum()) + first - start, end - first)

    def _score(self, sequence: Sequence, hidden_RD: torch.Tensor) -> None:
        known = sequence.prompt_logprobs
        logprobs_RV = torch.log_softmax(self._logits(hidden_RD), dim=-1)
        start, count = len(known) + 1, len(hidden_RD)
        targets = list(sequence.request.prompt_token_ids[start : start + count])
        num_top = sequence.request.params.prompt_logprobs or 0
        known += _entries(logprobs_RV, targets, [num_top] * count)


def _entries(
    logprobs_RV: torch.Tensor, token_ids: list[int], num_top: list[int]
) -> Iterator[PositionLogprobs]:
    """For each row its token's log-probability, and the likeliest ones, best first."""
    at = torch.tensor(token_ids, device=logprobs_RV.device)[:, None]
    own = logprobs_RV.gather(1, at).squeeze(1).tolist()
    top = logprobs_RV.topk(min(max(num_top, default=0), logprobs_RV.shape[1]), dim=-1)
    for row in zip(token_ids, own, top.indices.tolist(), top.values.tolist(), num_top, strict=True):
        token_id, logprob, ids, values, count = row
        rivals = tuple(map(TokenLogprob, ids[:count], values[:count]))
        yield PositionLogprobs(TokenLogprob(token_id, logprob), rivals)
