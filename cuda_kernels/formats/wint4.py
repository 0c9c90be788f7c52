"""WINT4: 4-bit levels with one bf16 scale per column, canonical and in Paddle's SM75-SM90 weight-only
layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import search, wint8
from cuda_kernels.formats.encoder import damp
from cuda_kernels.formats.feedback import feedback_couplings
from cuda_kernels.formats.layout import FormatError, check, check_rows, check_weight

MAX_LEVEL = 7
_ROW_MULTIPLE = 64
_CLIPS = tuple(part / 20 for part in range(10, 21))  # of the scale that clips nothing
_DESCENTS = 1  # passes of coordinate descent


@dataclass(frozen=True, eq=False)
class Wint4Weight:
    """One projection [K, N], a level to a byte in plain row order."""

    quant_weight: Tensor  # int8 [K, N], -7..7
    weight_scale: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.quant_weight.shape[0], self.quant_weight.shape[1]


def quantize(weight: Tensor, *, hessian: Tensor | None = None) -> Wint4Weight:
    """Round to nearest with scale max|column|/7; a zero column gets scale 0.

    With `hessian` [K, K], the second moment of the inputs, columns are clipped where that costs least, and
    later rows absorb the error of earlier ones, the heaviest inputs first (GPTQ, Frantar et al. 2022). Then
    scales by least squares and levels by coordinate descent take turns.
    """
    check_weight(weight, _ROW_MULTIPLE)
    if hessian is None:
        return Wint4Weight(*wint8.round_columns(weight, MAX_LEVEL))
    check("hessian", hessian, (weight.shape[0], weight.shape[0]), hessian.dtype)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    rows, moment = weight.float()[order], damp(hessian.float())[order][:, order]
    scale = _clip(rows, moment.diagonal())
    levels = _feed_back(rows, scale, feedback_couplings(moment, block=1).matrix)
    for _ in range(_DESCENTS):
        scale = _refit(rows, levels, scale, moment)
        levels = _descend(rows, levels, scale, moment)
    scale = _refit(rows, levels, scale, moment)
    return Wint4Weight(torch.empty_like(levels, dtype=torch.int8).index_copy_(0, order, levels.char()), scale)


def _clip(rows: Tensor, importance: Tensor) -> Tensor:
    """The bf16 scale of each column whose rounding costs least, errors weighted by their row's importance."""
    full = rows.abs().amax(dim=0) / MAX_LEVEL
    best, least = full.to(torch.bfloat16), torch.full_like(full, torch.inf)
    for factor in _CLIPS:
        scale = (full * factor).to(torch.bfloat16)
        error = rows - _round(rows, scale) * scale
        cost = importance @ error.square()
        best, least = torch.where(cost < least, scale, best), torch.minimum(cost, least)
    return best


def _feed_back(rows: Tensor, scale: Tensor, coupling: Tensor) -> Tensor:
    """Levels f32 [K, N], row after row; 64 rows at a time take what those before them owe."""
    errors, levels = torch.zeros_like(rows), torch.empty_like(rows)
    for start in range(0, len(rows), _ROW_MULTIPLE):
        block = slice(start, start + _ROW_MULTIPLE)
        targets = rows[block] + coupling[block, :start] @ errors[:start]
        levels[block] = search.sweep_levels(targets, scale, coupling[block, block], None, MAX_LEVEL)
        errors[block] = targets - levels[block] * scale
    return levels


def _descend(rows: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Levels f32 [K, N] after each row has answered once to the errors of all others (coordinate descent on
    eᵀ H e)."""
    coupling = (hessian / hessian.diagonal().unsqueeze(1)).fill_diagonal_(0)
    levels, decoded = levels.clone(), levels * scale
    errors = rows - decoded
    for start in range(0, len(rows), _ROW_MULTIPLE):
        block = slice(start, start + _ROW_MULTIPLE)
        targets = rows[block] + coupling[block] @ errors
        levels[block] = search.sweep_levels(targets, scale, coupling[block, block], decoded[block], MAX_LEVEL)
        errors[block] = rows[block] - levels[block] * scale
    return levels


def _refit(rows: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The bf16 scale of each column by least squares under H; as it was where the levels are all zero."""
    weighted = hessian @ levels
    size, found = (weighted * levels).sum(dim=0), (weighted * rows).sum(dim=0)
    return torch.where(size > 0, found / size.clamp(min=1e-30), scale.float()).to(torch.bfloat16)


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    divisor = torch.where(scale == 0, 1.0, scale.float())
    return (weight / divisor).round().clamp(-MAX_LEVEL, MAX_LEVEL)


def dequantize(quant_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Canonical levels int8 [K, N] times bf16 scales [N], bf16 [K, N]."""
    return wint8.dequantize(quant_weight, weight_scale)


# Paddle stores level + 8, two rows a byte, even row in the low nibble. The 16 bytes of 32 rows are dealt out
# in fours, four columns alternate every 64 rows, and the eight nibbles of every u32 are dealt out once more:
#
#     byte pairs   0 4 8 12  1 5 9 13  2 6 10 14  3 7 11 15        (stored position of source byte i is
# _BYTE[i])
#     nibbles      0 2 4 6 1 3 5 7                                 (stored nibble i is source nibble
# _NIBBLE[i])
_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(levels: Tensor) -> Tensor:
    """Canonical int8 [K, N] to Paddle's bytes, labelled int8 [N/2, K]; K a multiple of 64, N of 4."""
    rows, columns = levels.shape
    _check_sizes(rows, columns)
    nibbles = (levels + 8).view(torch.uint8).view(rows // 64, 2, 4, 4, 2, columns // 4, 4)
    words = nibbles.permute(5, 0, 6, 1, 3, 2, 4).reshape(-1, 8)[:, _NIBBLE]
    return _join(words).view(columns // 2, rows).view(torch.int8)


def unpack(packed: Tensor) -> Tensor:
    """Paddle's bytes int8 [N/2, K] to canonical int8 [K, N]."""
    columns, rows = 2 * packed.shape[0], packed.shape[1]
    _check_sizes(rows, columns)
    words = _split(packed.view(torch.uint8)).view(-1, 8)[:, _inverse(_NIBBLE)]
    nibbles = words.view(columns // 4, rows // 64, 4, 2, 4, 4, 2).permute(1, 3, 5, 4, 6, 0, 2)
    return nibbles.reshape(rows, columns).view(torch.int8) - 8


def _join(nibbles: Tensor) -> Tensor:
    pairs = nibbles.reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _split(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _check_sizes(rows: int, columns: int) -> None:
    check_rows("quant_weight", rows, _ROW_MULTIPLE)
    if columns % 4:
        raise FormatError(f"quant_weight: {columns} columns, Paddle's WINT4 layout needs a multiple of 4")
