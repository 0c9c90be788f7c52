"""A mixture-of-experts layer: router, routed experts and, where the model has one, the shared expert.

Shapes: T tokens, D hidden, E experts, A activated experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.cpu.panels import PanelExperts
from cuda_kernels.grouped_routing import route_grouped
from cuda_kernels.moe import ExpertWeights, StreamedExperts, moe_ffn
from cuda_kernels.routing import choose_experts
from gpu_worker.config import GroupedRouting
from gpu_worker.layers.linear import Linear, PanelSwiGLU, SwiGLU


@dataclass(frozen=True, slots=True)
class Router:
    """Scores the experts in float32 and chooses A of them for each token."""

    weight: Linear  # [E, D] float32
    correction_bias_E: torch.Tensor  # float32; takes part in the choice only
    num_experts_per_token: int
    norm_min: float
    grouped: GroupedRouting | None = None  # instead of a softmax with norm_min

    def __call__(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.grouped is None:
            return choose_experts(
                hidden_TD,
                self.weight.weight,
                self.correction_bias_E,
                self.num_experts_per_token,
                self.norm_min,
            )
        return route_grouped(
            self.weight(hidden_TD.float()),
            self.correction_bias_E,
            self.num_experts_per_token,
            self.grouped.num_groups,
            self.grouped.num_chosen_groups,
            self.grouped.is_normalized,
            self.grouped.scale,
        )


@dataclass(frozen=True, slots=True)
class MoE:
    """sum of weight_e · expert_e(x) over the chosen experts, plus shared(x)."""

    router: Router
    experts: ExpertWeights | StreamedExperts | PanelExperts
    shared: SwiGLU | PanelSwiGLU | None
    shared_gate: Linear | None = None  # [1, D]: how much of shared(x) each token takes
    num_splits: int = 1  # an expert's hidden features are dealt out over so many of `experts`

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        expert_ids_TA, expert_weights_TA = self.router(hidden_TD)
        if self.num_splits > 1:
            expert_ids_TA, expert_weights_TA = self._split(expert_ids_TA, expert_weights_TA)
        routed_TD = moe_ffn(hidden_TD, expert_ids_TA, expert_weights_TA, self.experts)
        if self.shared is None:
            return routed_TD
        shared_TD = self.shared(hidden_TD)
        if self.shared_gate is not None:
            shared_TD = shared_TD * self.shared_gate(hidden_TD).sigmoid()
        return routed_TD + shared_TD

    def _split(self, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All parts of a chosen expert, each with its weight: their sum is the expert's value."""
        part = torch.arange(self.num_splits, dtype=ids_TA.dtype, device=ids_TA.device)
        ids_TAS = ids_TA.unsqueeze(-1) * self.num_splits + part
        return ids_TAS.flatten(1), weights_TA.repeat_interleave(self.num_splits, dim=1)
