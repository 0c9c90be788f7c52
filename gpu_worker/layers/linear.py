"""A linear layer over a packed weight, and the SwiGLU network made of two of them.

Shapes: T tokens, K input features, N output features, D hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.linear import DenseWeight, linear
from cuda_kernels.moe import silu_and_mul


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x · Wᵀ, no bias."""

    weight: DenseWeight

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return linear(x_TK, self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """down(silu(gate(x)) · up(x)), gate and up fused in one weight [2F, D], gate rows first."""

    up_gate: Linear
    down: Linear

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return self.down(silu_and_mul(self.up_gate(hidden_TD)))

    @property
    def nbytes(self) -> int:
        return self.up_gate.nbytes + self.down.nbytes
