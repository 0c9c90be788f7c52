"""How many tokens each expert was given: counted on the device, read when somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from gpu_worker.layers.moe import MoE, Router
from gpu_worker.model.decoder import Decoder

ExpertTokens = Mapping[int, list[int]]  # by layer, then by expert


@dataclass(frozen=True, slots=True)
class CountingRouter(Router):
    """Adds one to each chosen expert's count. A CUDA graph's padding rows are counted too."""

    counts_E: torch.Tensor  # int64

    def __call__(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Named in full: a dataclass with slots is a new class, which `super()` does not know.
        expert_ids_TA, expert_weights_TA = Router.__call__(self, hidden_TD)
        chosen = expert_ids_TA.flatten().long()
        self.counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
        return expert_ids_TA, expert_weights_TA


def with_expert_counts(decoder: Decoder) -> Decoder:
    """The same decoder, which counts from now on; weights are shared."""
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, router=_counting(layer.mlp.router)))
        if isinstance(layer.mlp, MoE)
        else layer
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers)


def read_expert_tokens(decoder: Decoder) -> ExpertTokens:
    """Tokens each expert was given so far; empty if the decoder does not count."""
    routers = {i: layer.mlp.router for i, layer in enumerate(decoder.layers) if isinstance(layer.mlp, MoE)}
    return {i: one.counts_E.tolist() for i, one in routers.items() if isinstance(one, CountingRouter)}


def _counting(router: Router) -> CountingRouter:
    own = {field.name: getattr(router, field.name) for field in fields(router)}
    return CountingRouter(**own, counts_E=torch.zeros_like(router.correction_bias_E, dtype=torch.int64))
