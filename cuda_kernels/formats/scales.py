"""Scales of one column: a 4-bit local scale per group and a bf16 super scale, fitted around nearest codes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import search
from cuda_kernels.formats.layout import GROUP_SIZE

MAX_LOCAL = 15
BLOCKS = GROUP_SIZE // 4  # blocks of four rows, a byte each, in a group
_RMS_TO_SCALE = 0.060  # best scale of the good codebooks for weights of deviation 1
_STARTS = (0.86, 1.0, 1.16)
_STEP_FACTORS = torch.linspace(0.85, 2.0, 24).tolist()


@dataclass(frozen=True, eq=False)
class Metric:
    """How much an error costs: |F_r e|² for the four rows of block r, F_r the same for every column."""

    factors: Tensor  # f32 [K/4, 4, 4], or [1, 4, 4] where all blocks share one

    @classmethod
    def plain(cls, device: torch.device) -> "Metric":
        return cls(torch.eye(4, device=device).unsqueeze(0))

    def map_rows(self, rows: Tensor) -> Tensor:
        """F_r times each block of rows [K, N], as [K/4, 4, N]."""
        return self.factors @ rows.view(-1, 4, rows.shape[1])

    def map_book(self, book: Tensor) -> Tensor:
        """F_r times each code of book [C, 4], as [K/4, C, 4] or [1, C, 4]."""
        return (book @ self.factors.mT).contiguous()

    def group_weight(self) -> Tensor:
        """What an error of one in every row of a group costs on average, [G, 1] or [1, 1]."""
        cost = self.factors.square().sum(dim=(1, 2))
        return (cost.repeat(BLOCKS) if len(cost) == 1 else cost).view(-1, BLOCKS).sum(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Scales:
    """Local integers and their step."""

    local: Tensor  # f32 [G, N], integers 0..15
    step: Tensor  # f32 [N], bf16 values

    @property
    def values(self) -> Tensor:
        """f32 [G, N], the product rounded to bf16 as the decoder of record rounds it."""
        return (self.local.to(torch.bfloat16) * self.step.to(torch.bfloat16)).float()

    def columns(self, index: Tensor) -> "Scales":
        """The same for some of the columns."""
        return Scales(self.local[:, index], self.step[index])


@dataclass(frozen=True, eq=False)
class _Match:
    """Nearest codes c of rows w under given scales s, and what least squares needs of them, per group."""

    index: Tensor  # int32 [K/4, N]
    gain: Tensor  # f32 [G, N], |w - s·c|² - |w|²
    dot: Tensor  # f32 [G, N], <w, c>
    norm: Tensor  # f32 [G, N], <c, c>


class Fitter:
    """Fits codes and scales of f32 rows [K, N] under a metric, to one codebook [256, 4] or another."""

    def __init__(self, rows: Tensor, metric: Metric) -> None:
        self._rows = rows
        self._metric = metric
        self._mapped = metric.map_rows(rows)
        self._energy = _per_group(self._mapped.square().sum(dim=1))

    def columns(self, index: Tensor) -> "Fitter":
        """The same for some of the columns."""
        return Fitter(self._rows[:, index], self._metric)

    def all_columns(self) -> Tensor:
        """Their numbers, int64 [N]."""
        return torch.arange(self._rows.shape[1], device=self._rows.device)

    def start(self, book: Tensor) -> Scales:
        """Scales to begin with: for every group the best of a few, rounded to multiples of a step."""
        base = self._base()
        books = Books(book, self._metric)
        best = self._match(books, base)
        for factor in _STARTS:
            best = _better(self._match(books, base * factor), best)
        return snap(best.dot / best.norm.clamp(min=1e-30), best.norm)

    def round(self, book: Tensor) -> "Fit":
        """Nearest codes under scales that only the groups' deviations choose."""
        scales = snap(self._base(), torch.ones_like(self._energy))
        match = self._match(Books(book, self._metric), scales.values)
        return Fit(match.index, scales, (match.gain + self._energy).sum(dim=0))

    def promise(self, book: Tensor) -> Tensor:
        """The squared error, f32 [N], of a book's nearest codes under the groups' deviations as scales, were
        each scale then free: a sixth of a trial's work, and nearly its ranking of books."""
        match = self._match(Books(book, self._metric), self._base())
        return (self._energy - match.dot.square() / match.norm.clamp(min=1e-30)).sum(dim=0)

    def _base(self) -> Tensor:
        weight = self._metric.group_weight()
        return _RMS_TO_SCALE * (self._energy / weight.clamp(min=1e-30)).sqrt()

    def fit(self, book: Tensor, scales: Scales, rounds: int) -> "Fit":
        """Alternate codes and scales, beginning and ending with codes."""
        books = Books(book, self._metric)
        for _ in range(rounds):
            scales, match = self._choose_local(books, scales)
            scales = Scales(scales.local, refit_step(scales, match.dot, match.norm))
        scales, match = self._choose_local(books, scales)
        return Fit(match.index, scales, (match.gain + self._energy).sum(dim=0))

    def _choose_local(self, books: "Books", scales: Scales) -> tuple[Scales, _Match]:
        matches: list[_Match] = []

        def cost(candidate: Scales) -> Tensor:
            matches.append(self._match(books, candidate.values))
            return matches[-1].gain

        chosen = choose_local(scales, cost)
        best = matches[0]
        for match in matches[1:]:
            best = _better(match, best)
        return chosen, best

    def _match(self, books: "Books", scale: Tensor) -> _Match:
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        found = search.nearest(self._mapped * _spread(inverse).unsqueeze(1), books.mapped)
        norms = books.norms.expand(found.found.shape[0], -1).gather(1, found.found.long())
        norm, score = _per_group(norms), _per_group(found.score)
        return _Match(found.found, 2 * scale.square() * score, scale * (norm / 2 - score), norm)


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit has found, and what it costs."""

    codes: Tensor  # int32 [K/4, N]
    scales: Scales
    error: Tensor  # f32 [N], squared


class Books:
    """A codebook as each block of four rows sees it under a metric."""

    def __init__(self, book: Tensor, metric: Metric) -> None:
        self.mapped = metric.map_book(book)  # f32 [K/4 or 1, 256, 4]
        self.norms = self.mapped.square().sum(dim=-1)


def choose_local(scales: Scales, cost: Callable[[Scales], Tensor]) -> Scales:
    """The cheapest of each group's local scale and its two neighbours; `cost` gives [G, N] for a
    candidate."""
    best, least = scales.local, cost(scales)
    for delta in (-1, 1):
        candidate = Scales((scales.local + delta).clamp(0, MAX_LOCAL), scales.step)
        value = cost(candidate)
        best = torch.where(value < least, candidate.local, best)
        least = torch.minimum(least, value)
    return Scales(best, scales.step)


def snap(ideal: Tensor, weight: Tensor) -> Scales:
    """The step whose multiples 0..15 lie nearest to the ideal scales [G, N], errors weighted by `weight`."""
    ideal = ideal.clamp(min=0)
    full = ideal.amax(dim=0) / MAX_LOCAL
    best, least = full, torch.full_like(full, torch.inf)
    for factor in _STEP_FACTORS:
        step = full * factor
        error = (weight * (ideal - step * _round_local(ideal, step)).square()).sum(dim=0)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    step = best.to(torch.bfloat16).float()
    return Scales(_round_local(ideal, step), step)


def refit_step(scales: Scales, dot: Tensor, norm: Tensor) -> Tensor:
    """Least squares for the step given <w, c> and <c, c> per group; bf16 values, f32 [N]."""
    size = (scales.local.square() * norm).sum(dim=0)
    step = (scales.local * dot).sum(dim=0) / size.clamp(min=1e-30)
    return torch.where(size > 0, step.clamp(min=0), scales.step).to(torch.bfloat16).float()


def _round_local(ideal: Tensor, step: Tensor) -> Tensor:
    return (ideal / torch.where(step == 0, 1.0, step)).round().clamp(0, MAX_LOCAL)


def _better(candidate: _Match, best: _Match) -> _Match:
    wins = candidate.gain < best.gain
    rows = _spread(wins)
    return _Match(
        torch.where(rows, candidate.index, best.index),
        torch.where(wins, candidate.gain, best.gain),
        torch.where(wins, candidate.dot, best.dot),
        torch.where(wins, candidate.norm, best.norm),
    )


def _per_group(blocks: Tensor) -> Tensor:
    return blocks.view(-1, BLOCKS, blocks.shape[1]).sum(dim=1)


def _spread(groups: Tensor) -> Tensor:
    return groups.repeat_interleave(BLOCKS, dim=0)
