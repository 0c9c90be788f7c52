"""The token embedding, whose vocabulary the ranks of a tensor-parallel group share.

Shapes: T tokens, V vocabulary (of this rank), D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpu_worker.layers.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Embedding:
    """The rows of tokens `first` to `first + V`; those of other tokens come from the ranks that have them."""

    weight_VD: torch.Tensor
    first: int = 0
    ranks: Ranks = ALONE

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self.ranks.size == 1:
            return F.embedding(ids_T, self.weight_VD)
        rows_T = ids_T - self.first
        is_here_T = (rows_T >= 0) & (rows_T < len(self.weight_VD))
        found_TD = F.embedding(torch.where(is_here_T, rows_T, 0), self.weight_VD)
        return self.ranks.sum(torch.where(is_here_T.unsqueeze(1), found_TD, 0))
