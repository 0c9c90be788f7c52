"""How many tokens each expert was given: counted on the device, read when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from gpu_worker.layers.moe import MoE
from gpu_worker.model.decoder import Decoder

ExpertTokens = Mapping[int, list[int]]  # by layer, then by expert


@dataclass(frozen=True, slots=True)
class CountingRouter:
    """Adds one to each chosen expert's count. A CUDA graph's padding rows are counted too."""

    router: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    counts_E: torch.Tensor  # int64

    def __call__(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert_ids_TA, expert_weights_TA = self.router(hidden_TD)
        chosen = expert_ids_TA.flatten().long()
        self.counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        return expert_ids_TA, expert_weights_TA


def with_expert_counts(decoder: Decoder) -> Decoder:
    """The same decoder, which counts from now on; weights are shared."""
    layers = tuple(
        replace(layer, mlp=_counting(layer.mlp)) if isinstance(layer.mlp, MoE) else layer
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers)


def read_expert_tokens(decoder: Decoder) -> ExpertTokens:
    """Tokens each expert was given so far; empty if the decoder does not count."""
    routers: dict[int, object] = {
        i: layer.mlp.router for i, layer in enumerate(decoder.layers) if isinstance(layer.mlp, MoE)
    }
    return {i: one.counts_E.tolist() for i, one in routers.items() if isinstance(one, CountingRouter)}


def _counting(moe: MoE) -> MoE:
    counts_E = torch.zeros_like(moe.router.correction_bias_E, dtype=torch.int64)
    return replace(moe, router=CountingRouter(moe.router, counts_E))  # type: ignore[arg-type]
