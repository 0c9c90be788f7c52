"""Repetition, presence and frequency penalties from running counts of each sequence's tokens.

N rows of the sequence table, S sequences of a step, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.engine.sequence import Sequence


class TokenCounts:
    """Each row's tokens, counted; memory is taken when the first penalised request arrives."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._completion_NV = torch.zeros(0)
        self._prompt_NV = torch.zeros(0)

    def set_row(self, row: int, sequence: Sequence) -> None:
        """Counts the tokens of a sequence that starts, or goes on after a preemption."""
        if not self._completion_NV.numel():
            self._completion_NV = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._prompt_NV = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        prompt, completion = np.split(sequence.token_ids.astype(np.int64), [sequence.num_prompt_tokens])
        self._prompt_NV[row] = self._count(prompt) > 0
        self._completion_NV[row] = self._count(completion)

    def add(self, rows_S: torch.Tensor, token_ids_S: torch.Tensor) -> None:
        """Counts one more token in each row; the rows differ."""
        self._completion_NV[rows_S, token_ids_S] += 1

    def penalise(
        self,
        logits_SV: torch.Tensor,
        rows_S: torch.Tensor,
        repetition_S: torch.Tensor,
        presence_S: torch.Tensor,
        frequency_S: torch.Tensor,
    ) -> torch.Tensor:
        """Logits after the penalties; only repetition looks at the prompt besides the completion."""
        counts_SV = self._completion_NV[rows_S]
        is_generated_SV = counts_SV > 0
        factor_SV = torch.where(logits_SV > 0, 1 / repetition_S[:, None], repetition_S[:, None])
        is_repeated_SV = is_generated_SV | self._prompt_NV[rows_S]
        logits_SV = torch.where(is_repeated_SV, logits_SV * factor_SV, logits_SV)
        return logits_SV - frequency_S[:, None] * counts_SV - presence_S[:, None] * is_generated_SV

    def _count(self, token_ids: NDArray[np.int64]) -> torch.Tensor:
        counts = np.bincount(token_ids, minlength=self._shape[1])
        return torch.from_numpy(counts).to(self._device, torch.int32)
