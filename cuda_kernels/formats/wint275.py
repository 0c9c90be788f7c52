"""WINT2.75: 22 bytes hold 64 rows and their scale: 2.75 bits a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import overlapped
from cuda_kernels.formats.layout import GROUP_SIZE, FormatError, check, check_weight

BYTES = 22  # per group

#      7  6 | 5  4 | 3  2 | 1  0     bytes 0..20 of a group
#     '---- f0 ----'                 row 3j       (4,3,2) code: neighbours share two bits
#            '---- f1 ----'          row 3j+1
#                   '---- f2 ----'   row 3j+2
#      byte 21: high nibble row 63, low nibble the group's local scale
_SHIFTS = (4, 2, 0)
_FIELD_OFFSET = 8
_MAX_LOCAL = 15


@dataclass(frozen=True, eq=False)
class Wint275Weight:
    """One projection [K, N] as stored."""

    quant_weight: Tensor  # uint8 [K/64*22, N]
    super_scales: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.quant_weight.shape[0] // BYTES * GROUP_SIZE, self.quant_weight.shape[1]


def quantize(weight: Tensor) -> Wint275Weight:
    """Nearest code of each 3-vector under a 4-bit scale per group fitted by least squares; K a multiple of
    64."""
    check_weight(weight, GROUP_SIZE)
    fit = overlapped.fit(weight.float(), (overlapped.Code(4, 3, 2),), _MAX_LOCAL)
    last = (fit.last_level + _FIELD_OFFSET) << 4 | fit.local_scales
    packed = torch.cat([fit.codes[0], last.unsqueeze(1)], dim=1)
    return Wint275Weight(packed.flatten(0, 1).to(torch.uint8), fit.super_scales)


def pack(levels: Tensor, local_scales: Tensor, super_scales: Tensor) -> Wint275Weight:
    """Levels -8..7 [K, N] whose neighbours share bits, and local scales 0..15 [K/64, N], to bytes."""
    fields = (levels.int() + _FIELD_OFFSET).view(-1, GROUP_SIZE, levels.shape[1])
    last = fields[:, 63] << 4 | local_scales.int()
    packed = torch.cat([overlapped.join(fields[:, :63], _SHIFTS), last.unsqueeze(1)], dim=1)
    return Wint275Weight(packed.flatten(0, 1).to(torch.uint8), super_scales)


def unpack(weight: Wint275Weight) -> tuple[Tensor, Tensor]:
    """Levels int8 [K, N] and local scales int32 [K/64, N]."""
    packed = weight.quant_weight.int().view(-1, BYTES, weight.quant_weight.shape[1])
    fields = overlapped.split(packed[:, :21], _SHIFTS, mask=15)
    levels = torch.cat([fields, packed[:, 21:] >> 4], dim=1) - _FIELD_OFFSET
    return levels.to(torch.int8).flatten(0, 1), packed[:, 21] & _MAX_LOCAL


def dequantize(quant_weight: Tensor, super_scales: Tensor) -> Tensor:
    """The weights, bf16 [K, N]: level · (local · super), the product in fp32, rounded once."""
    if quant_weight.ndim != 2 or quant_weight.dtype != torch.uint8 or quant_weight.shape[0] % BYTES:
        raise FormatError(
            f"quant_weight: expected uint8 [K/64*22, N], got {quant_weight.dtype} {list(quant_weight.shape)}"
        )
    check("super_scales", super_scales, (quant_weight.shape[1],), torch.bfloat16)
    return overlapped.scale(*unpack(Wint275Weight(quant_weight, super_scales)), super_scales)
