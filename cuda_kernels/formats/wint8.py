"""WINT8: int8 levels with one bf16 scale per column, canonical and in Paddle's SM75-SM90 weight-only
layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats.layout import FormatError, check, check_rows, check_weight

MAX_LEVEL = 127
_ROW_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Wint8Weight:
    """One projection [K, N], levels in plain row order."""

    quant_weight: Tensor  # int8 [K, N], -127..127
    weight_scale: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.quant_weight.shape[0], self.quant_weight.shape[1]


def quantize(weight: Tensor) -> Wint8Weight:
    """Round to nearest with scale max|column|/127; a zero column gets scale 0."""
    check_weight(weight, _ROW_MULTIPLE)
    return Wint8Weight(*round_columns(weight, MAX_LEVEL))


def round_columns(weight: Tensor, max_level: int) -> tuple[Tensor, Tensor]:
    """Levels int8 [K, N] and bf16 scales [N] of a symmetric per-column rounding."""
    scale = (weight.float().abs().amax(dim=0) / max_level).to(torch.bfloat16)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    levels = (weight.float() / divisor).round().clamp(-max_level, max_level)
    return levels.to(torch.int8), scale


def dequantize(quant_weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Canonical levels int8 [K, N] times bf16 scales [N], bf16 [K, N]."""
    if quant_weight.ndim != 2:
        raise FormatError(f"quant_weight: expected int8 [K, N], got {list(quant_weight.shape)}")
    check("quant_weight", quant_weight, tuple(quant_weight.shape), torch.int8)
    check("weight_scale", weight_scale, (quant_weight.shape[1],), torch.bfloat16)
    return quant_weight.to(torch.bfloat16) * weight_scale


# Paddle stores level + 128. The first eight rows of every 16 take the even places, the other eight the odd
# ones; 64 rows of an even column are followed by the same 64 rows of the odd column beside it:
#
#     byte   | column 2j: rows 0 8 1 9 .. 7 15 | 16 24 17 .. | .. 63 | column 2j+1: rows 0 8 1 9 .. | next 64
# rows ..


def pack(levels: Tensor) -> Tensor:
    """Canonical int8 [K, N] to Paddle's bytes, labelled int8 [N, K]; K a multiple of 64, N of 2."""
    rows, columns = levels.shape
    _check_sizes(rows, columns)
    places = levels.view(rows // 64, 4, 2, 8, columns // 2, 2).permute(4, 0, 5, 1, 3, 2)
    return (places.reshape(columns, rows) ^ -128).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """Paddle's bytes int8 [N, K] to canonical int8 [K, N]."""
    columns, rows = packed.shape
    _check_sizes(rows, columns)
    places = packed.view(columns // 2, rows // 64, 2, 4, 8, 2).permute(1, 3, 5, 4, 0, 2)
    return (places.reshape(rows, columns) ^ -128).contiguous()


def _check_sizes(rows: int, columns: int) -> None:
    check_rows("quant_weight", rows, _ROW_MULTIPLE)
    if columns % 2:
        raise FormatError(f"quant_weight: {columns} columns, Paddle's WINT8 layout needs a multiple of 2")
