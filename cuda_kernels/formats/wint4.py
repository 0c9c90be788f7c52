"""WINT4: 4-bit levels with one bf16 scale per column, canonical and in Paddle's SM75-SM90 weight-only
layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import wint8
from cuda_kernels.formats.layout import FormatError, check_rows, check_weight

MAX_LEVEL = 7
_ROW_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Wint4Weight:
    """One projection [K, N], a level to a byte in plain row order."""

    quant_weight: Tensor  # int8 [K, N], -7..7
    weight_scale: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.quant_weight.shape[0], self.quant_weight.shape[1]


def quantize(weight: Tensor) -> Wint4Weight:
    """Round to nearest with scale max|column|/7; a zero column gets scale 0."""
    check_weight(weight, _ROW_MULTIPLE)
    return Wint4Weight(*wint8.round_columns(weight, MAX_LEVEL))


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
