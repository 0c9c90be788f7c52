"""A mixture-of-experts layer: router, routed experts and, where the model has one, the shared expert.

Shapes: T tokens, D hidden, E experts, A activated experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.cpu.panels import PanelExperts
from cuda_kernels.moe import ExpertWeights, StreamedExperts, moe_ffn
from cuda_kernels.routing import route
from gpu_worker.layers.linear import Linear, PanelSwiGLU, SwiGLU


@dataclass(frozen=True, slots=True)
class Router:
    """Scores the experts in float32 and chooses A of them for each token."""

    weight: Linear  # [E, D] float32
    correction_bias_E: torch.Tensor  # float32; takes part in the choice only
    num_experts_per_token: int
    norm_min: float

    def __call__(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TE = self.weight(hidden_TD.float())
        return route(logits_TE, self.correction_bias_E, self.num_experts_per_token, self.norm_min)


@dataclass(frozen=True, slots=True)
class MoE:
    """sum of weight_e · expert_e(x) over the chosen experts, plus shared(x)."""

    router: Router
    experts: ExpertWeights | StreamedExperts | PanelExperts
    shared: SwiGLU | PanelSwiGLU | None

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        expert_ids_TA, expert_weights_TA = self.router(hidden_TD)
        routed_TD = moe_ffn(hidden_TD, expert_ids_TA, expert_weights_TA, self.experts)
        return routed_TD if self.shared is None else routed_TD + self.shared(hidden_TD)
