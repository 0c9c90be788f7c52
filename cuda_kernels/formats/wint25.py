"""WINT2.5: ten 16-bit words hold 64 rows and their scale: 2.5 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import overlapped
from cuda_kernels.formats.layout import GROUP_SIZE, FormatError, check, check_weight

WORDS = 10  # per group

#      15 14 13 | 12 | 11 | 10 |  9 ||  8 |  7 |  6 |  5 |  4 |  3 |  2 |  1 |  0     words 0..8 of a group
#     '-- f0 --'      |              ||                                                rows 7j .. 7j+6
#            '-(13..11)-'            ||  a (3,3,2) code of 7 bits, then a (3,4,2) code of 9 bits:
#                 '-(11..9)-'        ||  neighbours share one bit
#      word 9: bits 15..13 row 63, bits 12..0 the group's integer local scale
_SHIFTS = (13, 11, 9, 6, 4, 2, 0)
_FIELD_OFFSET = 4
_MAX_LOCAL = 0x1FFF


@dataclass(frozen=True, eq=False)
class Wint25Weight:
    """One projection [K, N] as stored."""

    quant_weight: Tensor  # int16 [K/64*10, N], the bits of uint16 words
    super_scales: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.quant_weight.shape[0] // WORDS * GROUP_SIZE, self.quant_weight.shape[1]


def quantize(weight: Tensor) -> Wint25Weight:
    """Nearest code of each 3- and 4-vector under a scale per group fitted by least squares; K a multiple of
    64."""
    check_weight(weight, GROUP_SIZE)
    fit = overlapped.fit(weight.float(), (overlapped.Code(3, 3, 2), overlapped.Code(3, 4, 2)), _MAX_LOCAL)
    words = fit.codes[0] << 9 | fit.codes[1]
    last = (fit.last_level + _FIELD_OFFSET) << 13 | fit.local_scales
    return Wint25Weight(
        _to_int16(torch.cat([words, last.unsqueeze(1)], dim=1).flatten(0, 1)), fit.super_scales
    )


def pack(levels: Tensor, local_scales: Tensor, super_scales: Tensor) -> Wint25Weight:
    """Levels -4..3 [K, N] whose neighbours share bits, and local scales 0..8191 [K/64, N], to words."""
    fields = (levels.int() + _FIELD_OFFSET).view(-1, GROUP_SIZE, levels.shape[1])
    words = overlapped.join(fields[:, :63], _SHIFTS)
    last = fields[:, 63] << 13 | local_scales.int()
    return Wint25Weight(_to_int16(torch.cat([words, last.unsqueeze(1)], dim=1).flatten(0, 1)), super_scales)


def unpack(weight: Wint25Weight) -> tuple[Tensor, Tensor]:
    """Levels int8 [K, N] and local scales int32 [K/64, N]."""
    words = (weight.quant_weight.int() & 0xFFFF).view(-1, WORDS, weight.quant_weight.shape[1])
    fields = overlapped.split(words[:, :9], _SHIFTS, mask=7)
    levels = torch.cat([fields, words[:, 9:] >> 13], dim=1) - _FIELD_OFFSET
    return levels.to(torch.int8).flatten(0, 1), words[:, 9] & _MAX_LOCAL


def dequantize(quant_weight: Tensor, super_scales: Tensor) -> Tensor:
    """The weights, bf16 [K, N]: level · (local · super), the product in fp32, rounded once."""
    if quant_weight.ndim != 2 or quant_weight.dtype != torch.int16 or quant_weight.shape[0] % WORDS:
        raise FormatError(
            f"quant_weight: expected int16 [K/64*10, N], got {quant_weight.dtype} {list(quant_weight.shape)}"
        )
    check("super_scales", super_scales, (quant_weight.shape[1],), torch.bfloat16)
    return overlapped.scale(*unpack(Wint25Weight(quant_weight, super_scales)), super_scales)


def _to_int16(words: Tensor) -> Tensor:
    return torch.where(words > 0x7FFF, words - 0x10000, words).to(torch.int16)
