"""Finds out in which order a WINT2 file holds the rows inside a 64-group; the format does not say.

A hidden feature j of an expert that gate and up write with large weights (columns j and F + j) is also read
with large weights by down (row j). Columns are never permuted, rows are, so the right order shows itself by
the correlation of the two norms; the wrong one moves 15 of 16 rows and shows almost none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cuda_kernels.formats import wint2
from cuda_kernels.formats.layout import KOrder
from cuda_kernels.formats.wint2 import Wint2Weight
from gpu_worker.model.plan import MLPPlan, ModelPlan, MoEPlan

KOrderChoice = Literal["auto", "shuffled", "natural"]

_NUM_EXPERTS = 32  # sampled, evenly spread over the layers
_NUM_SAMPLED = 512  # rows of up_gate and columns of down that estimate the norms
_DEVIATIONS = 6.0  # a correlation of chance is this many standard deviations smaller


@dataclass(frozen=True, slots=True)
class KOrderFinding:
    """The order to read with, and why."""

    k_order: KOrder
    evidence: str


def choose_k_order(
    plan: ModelPlan, choice: KOrderChoice, recorded: KOrder | None = None
) -> KOrderFinding | None:
    """What was asked for, else what config.json has `recorded`, else what the weights show; None if the model
    has no WINT2 weight."""
    experts = _wint2_experts(plan)
    if not experts:
        return None
    if choice != "auto":
        return KOrderFinding(choice, "as asked")
    if recorded is not None:
        return KOrderFinding(recorded, "as config.json says")
    return judge([expert_norms(expert) for expert in _spread(experts)])


def judge(norms: Sequence[ExpertNorms]) -> KOrderFinding:
    """The order whose correlation is beyond chance, and beyond the other's; "shuffled" if neither is."""
    scores = {order: _mean_correlation(norms, order) for order in get_args(KOrder)}
    best = max(scores, key=scores.__getitem__)
    found = ", ".join(f"{order} {score:.3f}" for order, score in scores.items())
    evidence = f"correlation of {len(norms)} experts' norms: {found}"
    num_rows = sum(len(one.written) for one in norms)
    if abs(scores["shuffled"] - scores["natural"]) < _DEVIATIONS * num_rows**-0.5:
        return KOrderFinding(
            "shuffled", f"{evidence}: undecided, the newer order assumed; --k-order overrides"
        )
    return KOrderFinding(best, evidence)


@dataclass(frozen=True, slots=True)
class ExpertNorms:
    """Logarithms of the norms of an expert's F hidden features: as written by up_gate, and as read by down in
    either order."""

    written: torch.Tensor
    read: dict[KOrder, torch.Tensor]


def expert_norms(expert: MLPPlan) -> ExpertNorms:
    """Estimated from a part of the weights, so that no expert is decoded whole."""
    rows_per_entry = {"quant_weight": 4, "weight_scale": 128}
    up_gate = {
        name: tensor[: _NUM_SAMPLED // rows_per_entry[name]] if name in rows_per_entry else tensor
        for name, tensor in expert.up_gate.read().items()
    }
    down = {name: tensor[..., :_NUM_SAMPLED] for name, tensor in expert.down.read().items()}
    written = _log_norm(_decode(up_gate, "shuffled").square().mean(0).view(2, -1).sum(0))
    read = {order: _log_norm(_decode(down, order).square().mean(1)) for order in get_args(KOrder)}
    return ExpertNorms(written, {order: norms[: len(written)] for order, norms in read.items()})


def _decode(stored: dict[str, torch.Tensor], k_order: KOrder) -> torch.Tensor:
    weight = Wint2Weight(**{name: tensor.contiguous() for name, tensor in stored.items()})
    super_scales = weight.super_scales.to(torch.bfloat16)
    return wint2.dequantize(
        weight.quant_weight,
        weight.weight_scale,
        super_scales,
        weight.code_scale,
        weight.code_zp,
        k_order=k_order,
    ).float()


def _log_norm(mean_square: torch.Tensor) -> torch.Tensor:
    return mean_square.clamp(min=1e-20).log()


def _mean_correlation(norms: Sequence[ExpertNorms], order: KOrder) -> float:
    pairs = [torch.stack([one.written, one.read[order]]) for one in norms]
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).nanmean())


def _wint2_experts(plan: ModelPlan) -> list[MLPPlan]:
    layers = [layer.mlp for layer in plan.layers if isinstance(layer.mlp, MoEPlan)]
    experts = itertools.chain.from_iterable(layer.experts for layer in layers)
    return [expert for expert in experts if expert.down.format == expert.up_gate.format == "wint2"]


def _spread(experts: list[MLPPlan]) -> list[MLPPlan]:
    count = min(len(experts), _NUM_EXPERTS)
    return [experts[index * len(experts) // count] for index in range(count)]
