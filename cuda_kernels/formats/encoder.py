"""Finds the codes and scales of a WINT2 weight: plain search per column, then feedback and descent under a
Hessian."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cuda_kernels.formats import ccq
from cuda_kernels.formats.feedback import Settler, descent_couplings
from cuda_kernels.formats.layout import GROUP_SIZE, FormatError
from cuda_kernels.formats.scales import Fitter, Metric, Scales

Effort = Literal["fast", "normal", "best"]


@dataclass(frozen=True)
class Plan:
    """How hard one effort level works."""

    num_codebooks: int  # candidates of (code_scale, code_zp) tried on every column
    rounds: int  # alternations of codes and scales
    descents: int  # passes of coordinate descent after the feedback pass


PLANS: dict[Effort, Plan] = {
    "fast": Plan(num_codebooks=1, rounds=1, descents=0),
    "normal": Plan(num_codebooks=2, rounds=2, descents=2),
    "best": Plan(num_codebooks=24, rounds=2, descents=4),
}

# (code_scale, code_zp) on the 1/128 grid, where both published roundings and integer arithmetic agree on
# every code. tests/bench/search_codebooks.py found them: best mean squared error on Gaussian vectors first.
CODEBOOKS = (
    (120.9453125, 1240.4921875),
    (120.9609375, 1189.421875),
)

_DAMPING = 0.01  # of the mean diagonal, added to a Hessian


@dataclass(frozen=True, eq=False)
class Encoding:
    """A WINT2 weight [K, N] in slot order, before its bytes are laid out."""

    codes: Tensor  # uint8 [K/4, N]
    local_scales: Tensor  # uint8 [K/64, N]
    super_scales: Tensor  # bf16 [N]
    code_scale: Tensor  # f32 [N]
    code_zp: Tensor  # f32 [N]


def encode(slots: Tensor, hessian: Tensor | None, effort: Effort) -> Encoding:
    """The best encoding of f32 `slots` [K, N] that `effort` finds, for inputs of second moment `hessian` [K,
    K]."""
    if effort not in PLANS:
        raise FormatError(f"effort: expected one of {', '.join(PLANS)}, got {effort!r}")
    plan = PLANS[effort]
    if hessian is None:
        return _encode_plain(slots, Metric.plain(slots.shape[0], slots.device), plan)
    hessian = damp(hessian)
    order = _importance_order(hessian)
    found = _encode_settled(slots[order], hessian[order][:, order], plan)
    blocks = order[::4] // 4
    groups = order[::GROUP_SIZE] // GROUP_SIZE
    return replace(
        found,
        codes=torch.empty_like(found.codes).index_copy_(0, blocks, found.codes),
        local_scales=torch.empty_like(found.local_scales).index_copy_(0, groups, found.local_scales),
    )


def damp(hessian: Tensor) -> Tensor:
    """`hessian` made safely positive definite: inputs never seen (a zero diagonal) count as barely seen."""
    mean = hessian.diagonal().mean().clamp(min=1e-30)
    return hessian + torch.eye(hessian.shape[0], device=hessian.device) * (_DAMPING * mean)


def _importance_order(hessian: Tensor) -> Tensor:
    """Rows with the heaviest groups first and the heaviest blocks first in each: what comes early is best
    corrected."""
    weight = hessian.diagonal().view(-1, GROUP_SIZE // 4, 4).sum(dim=2)
    groups = weight.sum(dim=1).argsort(descending=True, stable=True)
    blocks = weight[groups].argsort(dim=1, descending=True, stable=True) + groups.unsqueeze(1) * (
        GROUP_SIZE // 4
    )
    return (blocks.view(-1, 1) * 4 + torch.arange(4, device=hessian.device)).flatten()


def _encode_plain(slots: Tensor, metric: Metric, plan: Plan) -> Encoding:
    """Per column the best of the plan's codebooks."""
    best: Encoding | None = None
    least = torch.full((slots.shape[1],), torch.inf, device=slots.device)
    for pair in CODEBOOKS[: plan.num_codebooks]:
        fitter = Fitter(slots, ccq.codebook(*pair).to(slots.device), metric)
        codes, scales, error = fitter.fit(plan.rounds)
        found = _as_encoding(codes, scales, pair)
        best = found if best is None else _merge(error < least, found, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _encode_settled(slots: Tensor, hessian: Tensor, plan: Plan) -> Encoding:
    pair = CODEBOOKS[0]
    book = ccq.codebook(*pair).to(slots.device)
    codes, scales, _ = Fitter(slots, book, descent_couplings(hessian).metric).fit(plan.rounds)
    settler = Settler(slots, hessian, book, scales, codes)
    settler.feed_back()
    for _ in range(plan.descents):
        settler.descend()
    return _as_encoding(settler.codes, settler.scales, pair)


def _as_encoding(codes: Tensor, scales: Scales, pair: tuple[float, float]) -> Encoding:
    code_scale, code_zp = (torch.full_like(scales.step, value) for value in pair)
    return Encoding(
        codes.to(torch.uint8),
        scales.local.to(torch.uint8),
        scales.step.to(torch.bfloat16),
        code_scale,
        code_zp,
    )


def _merge(wins: Tensor, found: Encoding, best: Encoding) -> Encoding:
    return Encoding(
        *(
            torch.where(wins, new, old)
            for new, old in zip(vars(found).values(), vars(best).values(), strict=True)
        )
    )
