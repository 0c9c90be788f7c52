"""Finds the codes and scales of a WINT2 weight: plain search per column, then feedback and descent under a
Hessian."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cuda_kernels.formats import ccq
from cuda_kernels.formats.codebooks import CODEBOOKS
from cuda_kernels.formats.feedback import Curvature, Settler, decode
from cuda_kernels.formats.layout import GROUP_SIZE, FormatError
from cuda_kernels.formats.scales import Fit, Fitter, Metric, Scales

Effort = Literal["fast", "normal", "best"]


@dataclass(frozen=True)
class Plan:
    """How hard one effort level works."""

    num_codebooks: int  # candidates of (code_scale, code_zp) tried on every column
    settled_codebooks: int  # the same under a Hessian, where a codebook more is a pass of its own
    trial_rounds: int  # alternations of codes and scales before a column chooses among these
    rounds: int  # the same afterwards
    descents: int  # passes of coordinate descent after the feedback pass
    mirrors: bool = False  # each codebook negated too, by a negative super scale; not under a Hessian
    finalists: int | None = None  # so many, the most promising of a column, are tried on it; None: all


PLANS: dict[Effort, Plan] = {
    "fast": Plan(num_codebooks=1, settled_codebooks=1, trial_rounds=1, rounds=0, descents=0),
    "normal": Plan(num_codebooks=8, settled_codebooks=1, trial_rounds=0, rounds=1, descents=2, finalists=1),
    "best": Plan(
        num_codebooks=len(CODEBOOKS),
        settled_codebooks=8,
        trial_rounds=1,
        rounds=4,
        descents=4,
        mirrors=True,
        finalists=4,
    ),
}

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
    if hessian is None:
        return _encode(slots, Metric.plain(slots.device), None, PLANS[effort])
    hessian = damp(hessian)
    order = _importance_order(hessian)
    curvature = Curvature.of(hessian[order][:, order])
    found = _encode(slots[order], curvature.descent.metric, curvature, PLANS[effort])
    blocks = order[::4] // 4
    groups = order[::GROUP_SIZE] // GROUP_SIZE
    return replace(
        found,
        codes=torch.empty_like(found.codes).index_copy_(0, blocks, found.codes),
        local_scales=torch.empty_like(found.local_scales).index_copy_(0, groups, found.local_scales),
    )


def rounded(rows: Tensor) -> Tensor:
    """f32 [K, N] as rounding alone would decode them: scales by the groups' deviation, then nearest codes."""
    book = ccq.codebook(*CODEBOOKS[0]).to(rows.device)
    fit = Fitter(rows, Metric.plain(rows.device)).round(book)
    return decode(book, fit.codes, fit.scales.values)


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


def _encode(rows: Tensor, metric: Metric, curvature: Curvature | None, plan: Plan) -> Encoding:
    """Scales by the first codebook, a trial of each; a column goes on with the one that suits it best."""
    pairs = CODEBOOKS[: plan.num_codebooks if curvature is None else plan.settled_codebooks]
    signs = (1, -1) if plan.mirrors and curvature is None else (1,)
    choices = [(sign, pair) for sign in signs for pair in pairs]
    books = [sign * ccq.codebook(*pair).to(rows.device) for sign, pair in choices]
    fitter = Fitter(rows, metric)
    begin = fitter.fit(books[0], fitter.start(books[0]), 1).scales
    choice, scales = _try_all(fitter, books, begin, plan)
    found = _empty(rows.shape, rows.device)
    for number in choice.unique().tolist():
        columns = (choice == number).nonzero().squeeze(1)
        fit = fitter.columns(columns).fit(books[number], scales.columns(columns), plan.rounds)
        if curvature is not None:
            settler = Settler(rows[:, columns], curvature, books[number], fit.scales, fit.codes)
            fit = _settle(settler, plan)
        _fill(found, columns, fit, *choices[number])
    return found


def _try_all(fitter: Fitter, books: list[Tensor], begin: Scales, plan: Plan) -> tuple[Tensor, Scales]:
    """For each column the number of its best codebook, int64 [N], and the scales that go with it."""
    number, least = torch.zeros_like(begin.step).long(), torch.full_like(begin.step, torch.inf)
    scales = Scales(begin.local.clone(), begin.step.clone())
    for index, columns in _finals(fitter, books, plan):
        trial = fitter.columns(columns).fit(books[index], begin.columns(columns), plan.trial_rounds)
        wins = trial.error < least[columns]
        won = columns[wins]
        number[won], least[won] = index, trial.error[wins]
        scales.local[:, won], scales.step[won] = trial.scales.local[:, wins], trial.scales.step[wins]
    return number, scales


def _finals(fitter: Fitter, books: list[Tensor], plan: Plan) -> Iterator[tuple[int, Tensor]]:
    """Number after number of the codebooks, and the columns that each is tried on."""
    if plan.finalists is None or len(books) <= plan.finalists:
        yield from ((number, fitter.all_columns()) for number in range(len(books)))
        return
    promises = torch.stack([fitter.promise(book) for book in books])
    best = promises.topk(plan.finalists, dim=0, largest=False).indices
    for number in best.unique().tolist():
        yield number, (best == number).any(dim=0).nonzero().squeeze(1)


def _settle(settler: Settler, plan: Plan) -> Fit:
    settler.feed_back()
    for _ in range(plan.descents):
        settler.descend()
    return Fit(settler.codes, settler.scales, settler.loss())


def _empty(shape: torch.Size, device: torch.device) -> Encoding:
    rows, columns = shape
    return Encoding(
        torch.empty(rows // 4, columns, dtype=torch.uint8, device=device),
        torch.empty(rows // GROUP_SIZE, columns, dtype=torch.uint8, device=device),
        torch.empty(columns, dtype=torch.bfloat16, device=device),
        torch.empty(columns, device=device),
        torch.empty(columns, device=device),
    )


def _fill(found: Encoding, columns: Tensor, fit: Fit, sign: int, pair: tuple[float, float]) -> None:
    found.codes[:, columns] = fit.codes.to(torch.uint8)
    found.local_scales[:, columns] = fit.scales.local.to(torch.uint8)
    found.super_scales[columns] = (sign * fit.scales.step).to(torch.bfloat16)
    found.code_scale[columns], found.code_zp[columns] = pair
