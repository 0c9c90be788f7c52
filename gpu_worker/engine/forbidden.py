"""Tokens that may not come next: bad words, all but the allowed ones, stops that come too early.

N rows of the sequence table, S sequences of a step, V vocabulary, K bad words of the step, L tokens of the
longest of them but for its last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.engine.sequence_table import Rows, SequenceTable
from gpu_worker.sampling_params import SamplingParams

_ANY = -1  # in a pattern: matches whatever stands there


@dataclass(frozen=True, slots=True)
class ForbiddenTokens:
    """What may never follow in a set of rows, in a form that a step can apply at once."""

    table: SequenceTable
    rows: Rows
    restricted: tuple[torch.Tensor, torch.Tensor]  # positions [R] in S, is forbidden [R, V]
    words: BadWords

    @staticmethod
    def of(
        table: SequenceTable, rows: Rows, params: list[SamplingParams], vocab_size: int, device: torch.device
    ) -> ForbiddenTokens:
        """`params` are those of the rows, in order."""
        return ForbiddenTokens(table, rows, _restrictions(params, vocab_size, device), BadWords.of(params))

    def apply(self, logits_SV: torch.Tensor) -> None:
        """Sets the logits of the forbidden tokens to minus infinity, in place."""
        at, is_forbidden_RV = self.restricted
        if len(at):
            logits_SV[at] = logits_SV[at].masked_fill(is_forbidden_RV, -torch.inf)
        table, rows = self.table, self.rows
        early = np.flatnonzero(table.num_tokens[rows] < table.min_total_tokens[rows])
        if len(early):
            _forbid(logits_SV, *self._early_stops(early))
        if len(self.words.last_K):
            _forbid(logits_SV, *self._completed_words())

    def _early_stops(self, early: Rows) -> tuple[Rows, Rows]:
        """(positions in S, token ids): the stop tokens of the sequences shorter than `min_tokens`."""
        stop_ids = self.table.stop_ids[self.rows[early]]
        position, column = np.nonzero(stop_ids >= 0)
        return early[position], stop_ids[position, column]

    def _completed_words(self) -> tuple[Rows, Rows]:
        """(positions in S, token ids): the last tokens of bad words of which the rest is there."""
        words, table = self.words, self.table
        rows_K = self.rows[words.position_K]
        ends_K = table.num_tokens[rows_K]
        back_L = np.arange(words.prefix_KL.shape[1])[::-1] + 1
        tokens_KL = table.token_ids[rows_K[:, None], np.maximum(ends_K[:, None] - back_L, 0)]
        is_met_K = ((tokens_KL == words.prefix_KL) | (words.prefix_KL == _ANY)).all(axis=1)
        is_met_K &= ends_K - table.num_prompt_tokens[rows_K] >= words.prefix_len_K
        return words.position_K[is_met_K], words.last_K[is_met_K]


@dataclass(frozen=True, slots=True)
class BadWords:
    """Runs of tokens that may not be completed: all but the last token, right-aligned, and the last one."""

    position_K: Rows  # in S
    prefix_KL: NDArray[np.int32]
    prefix_len_K: Rows
    last_K: Rows

    @staticmethod
    def of(params: list[SamplingParams]) -> BadWords:
        runs = [(i, run) for i, one in enumerate(params) for run in one.bad_words_token_ids]
        width = max((len(run) for _, run in runs), default=1) - 1
        prefixes = [(_ANY,) * (width + 1 - len(run)) + run[:-1] for _, run in runs]
        return BadWords(
            position_K=np.array([i for i, _ in runs], np.int64),
            prefix_KL=np.array(prefixes, np.int32).reshape(len(runs), width),
            prefix_len_K=np.array([len(run) - 1 for _, run in runs], np.int64),
            last_K=np.array([run[-1] for _, run in runs], np.int64),
        )


def _forbid(logits_SV: torch.Tensor, positions: Rows, token_ids: Rows) -> None:
    on_device = (torch.from_numpy(array).to(logits_SV.device) for array in (positions, token_ids))
    logits_SV[tuple(on_device)] = -torch.inf


def _restrictions(
    params: list[SamplingParams], vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    at = [i for i, one in enumerate(params) if one.allowed_token_ids]
    is_forbidden_RV = torch.ones((len(at), vocab_size), dtype=torch.bool)
    for is_forbidden_V, i in zip(is_forbidden_RV, at, strict=True):
        is_forbidden_V[list(params[i].allowed_token_ids)] = False
    return torch.tensor(at, dtype=torch.int64, device=device), is_forbidden_RV.to(device)
