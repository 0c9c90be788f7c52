"""RMS normalization with its weight.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels import norm
from gpu_worker.layers.ranks import Ranks


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Normalizes the residual stream, after adding what the previous sublayer gave."""

    weight_D: torch.Tensor
    eps: float

    def __call__(
        self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, residual): residual is hidden plus the old one, or hidden where the stream begins."""
        if residual_TD is None:
            return norm.rms_norm(hidden_TD, self.weight_D, self.eps), hidden_TD
        return norm.add_rms_norm(hidden_TD, residual_TD, self.weight_D, self.eps)


@dataclass(frozen=True, slots=True)
class SharedRMSNorm(RMSNorm):
    """Over all ranks' features together, equally many on each; `weight_D` is of this rank's."""

    ranks: Ranks

    def __call__(
        self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual_TD is not None:
            hidden_TD = hidden_TD + residual_TD
        x_TD = hidden_TD.float()
        variance_T1 = self.ranks.sum(x_TD.square().mean(-1, keepdim=True)) / self.ranks.size
        normed_TD = (x_TD * torch.rsqrt(variance_T1 + self.eps)).to(hidden_TD.dtype) * self.weight_D
        return normed_TD, hidden_TD
