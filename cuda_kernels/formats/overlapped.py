"""Words of overlapping bit fields, shared by WINT2.5 and WINT2.75: join, split, scale, and a least-squares
encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import search
from cuda_kernels.formats.layout import GROUP_SIZE

_FIT_ROUNDS = 2
_SCALE_CANDIDATES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)


@dataclass(frozen=True)
class Code:
    """An (L, N, S) convolutional code: `length` fields of `bits` bits, each shifted by `shift` from the
    last."""

    bits: int
    length: int
    shift: int

    def codebook(self) -> Tensor:
        """Every vector it can express, float32 [2^(bits + (length-1)·shift), length]."""
        codes = torch.arange(1 << (self.bits + (self.length - 1) * self.shift))
        shifts = [self.shift * i for i in reversed(range(self.length))]
        fields = [(codes >> shift) & ((1 << self.bits) - 1) for shift in shifts]
        return torch.stack(fields, dim=1).float() - (1 << (self.bits - 1))


@dataclass(frozen=True, eq=False)
class Fit:
    """What an encoder found for [K, N]: G groups of 64 rows, J words a group."""

    codes: list[Tensor]  # one int32 [G, J, N] for each code of a word
    last_level: Tensor  # int32 [G, N], row 63 of a group
    local_scales: Tensor  # int32 [G, N]
    super_scales: Tensor  # bf16 [N]


def join(fields: Tensor, shifts: Sequence[int]) -> Tensor:
    """Fields [G, J·len(shifts), N] to words [G, J, N]; bits that neighbours share must agree."""
    parts = fields.unflatten(1, (-1, len(shifts)))
    words = torch.zeros_like(parts[:, :, 0])
    for index, shift in enumerate(shifts):
        words = words | parts[:, :, index] << shift
    return words


def split(words: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Words [G, J, N] to fields [G, J·len(shifts), N]."""
    return torch.stack([(words >> shift) & mask for shift in shifts], dim=2).flatten(1, 2)


def scale(levels: Tensor, local_scales: Tensor, super_scales: Tensor) -> Tensor:
    """Level · (local · super) in fp32, rounded once to bf16; [K, N]."""
    product = local_scales.float() * super_scales.float()
    groups = levels.view(-1, GROUP_SIZE, levels.shape[1]).float() * product.unsqueeze(1)
    return groups.flatten(0, 1).to(torch.bfloat16)


def fit(weight: Tensor, codes: Sequence[Code], max_local: int) -> Fit:
    """Alternate nearest codes and least-squares scales for float32 `weight` [K, N]."""
    groups = weight.view(-1, GROUP_SIZE, weight.shape[1])
    scales = _best_start(groups, codes)
    super_scales = scales.amax(dim=0).div(max_local).to(torch.bfloat16)
    for _ in range(_FIT_ROUNDS):
        local = _to_local(scales, super_scales, max_local)
        found, levels = _nearest(groups, local * super_scales.float(), codes)
        scales = (groups * levels).sum(dim=1) / levels.square().sum(dim=1).clamp(min=1)
    local = _to_local(scales, super_scales, max_local)
    found, levels = _nearest(groups, local * super_scales.float(), codes)
    return Fit(found, levels[:, 63].int(), local.int(), super_scales)


def _best_start(groups: Tensor, codes: Sequence[Code]) -> Tensor:
    """For every group the best of a few multiples of a scale that spreads three deviations over the
    levels."""
    base = groups.square().mean(dim=1).sqrt() * 3 / (1 << (codes[0].bits - 1))
    best, best_error = base, torch.full_like(base, torch.inf)
    for factor in _SCALE_CANDIDATES:
        scales = base * factor
        levels = _nearest(groups, scales, codes)[1]
        error = (groups - levels * scales.unsqueeze(1)).square().sum(dim=1)
        best = torch.where(error < best_error, scales, best)
        best_error = torch.minimum(error, best_error)
    return best


def _to_local(scales: Tensor, super_scales: Tensor, max_local: int) -> Tensor:
    divisor = torch.where(super_scales == 0, 1.0, super_scales.float())
    return (scales / divisor).round().clamp(0, max_local)


def _nearest(groups: Tensor, scales: Tensor, codes: Sequence[Code]) -> tuple[list[Tensor], Tensor]:
    """The nearest codes of every word and the levels [G, 64, N] they decode to."""
    divisor = torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    targets = groups / divisor
    half = 1 << (codes[0].bits - 1)
    words = targets[:, :63].unflatten(1, (-1, sum(code.length for code in codes)))
    found, levels, start = [], [], 0
    for code in codes:
        book = code.codebook().to(groups.device)
        part = words[:, :, start : start + code.length]
        index = search.nearest(part.flatten(0, 1), book).found.long()
        found.append(index.view(words.shape[0], words.shape[1], -1).int())
        levels.append(book[index].movedim(-1, 1).view_as(part))
        start += code.length
    last = targets[:, 63:].round().clamp(-half, half - 1)
    return found, torch.cat([torch.cat(levels, dim=2).flatten(1, 2), last], dim=1)
