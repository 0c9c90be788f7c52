"""A linear layer over a packed weight, and the SwiGLU network made of two of them.

Shapes: T tokens, K input features, N output features, D hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.cpu.panels import PanelExperts, PanelWeight
from cuda_kernels.linear import DenseWeight, linear
from cuda_kernels.moe import silu_and_mul, swiglu_ffn
from cuda_kernels.tiled import TiledWeight


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x · Wᵀ, no bias."""

    weight: DenseWeight | TiledWeight | PanelWeight

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return linear(x_TK, self.weight)

    @property
    def is_gated(self) -> bool:
        """Whether its outputs are SwiGLU's already."""
        return isinstance(self.weight, TiledWeight) and self.weight.is_gated

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """down(silu(gate(x)) · up(x)), gate and up fused in one weight [2F, D], gate rows first."""

    up_gate: Linear
    down: Linear

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        inner = self.up_gate(hidden_TD)
        return self.down(inner if self.up_gate.is_gated else silu_and_mul(inner))

    @property
    def nbytes(self) -> int:
        return self.up_gate.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True)
class PanelSwiGLU:
    """The same network over weight panels, in one call."""

    network: PanelExperts

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return swiglu_ffn(hidden_TD, self.network)

    @property
    def nbytes(self) -> int:
        return self.network.nbytes
