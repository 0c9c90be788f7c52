"""The arithmetic of CCQ codes: byte -> 15-bit convolutional code -> four overlapping 6-bit fields."""

import torch
from torch import Tensor

NUM_CODES = 256
FIELD_OFFSET = 32  # a field holds q + 32, q in -32..31
CODE_MASK = 0x7FFF

#      14 13 12 | 11 10  9 |  8  7  6 |  5  4  3 |  2  1  0      a code
#     '------ f0 ------'                                         slot 4r
#                '------ f1 ------'                              slot 4r+1
#                           '------ f2 ------'                   slot 4r+2
#                                      '------ f3 ------'        slot 4r+3
_SHIFTS = (9, 6, 3, 0)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c on float32 tensors with one rounding, as the GPU's fmaf.

    A product of two float32 is exact in float64. The sum there is rounded to odd (Boldo & Melquiond 2008),
    so that the second rounding, to float32, cannot see a false tie.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def code_points(code_scale: Tensor, code_zp: Tensor) -> Tensor:
    """The 15-bit codes of the 256 bytes, floor(fma(byte, scale, zp + 0.5)) mod 2^15: f32 [N] -> int16 [256,
    N]."""
    byte = torch.arange(NUM_CODES, dtype=torch.float32, device=code_scale.device).unsqueeze(1)
    value = fma(byte, code_scale.expand(NUM_CODES, -1), (code_zp + 0.5).expand(NUM_CODES, -1))
    return (value.floor().long() & CODE_MASK).short()


def fields(codes: Tensor) -> Tensor:
    """15-bit codes [R, N] to their weights' integer levels, int8 [4R, N]; slot 4r+i is field i of code r."""
    levels = [((codes >> shift) & 63) - FIELD_OFFSET for shift in _SHIFTS]
    return torch.stack(levels, dim=1).to(torch.int8).flatten(0, 1)


def codebook(code_scale: float, code_zp: float) -> Tensor:
    """The 256 four-vectors one (scale, zp) pair can express, float32 [256, 4]."""
    points = code_points(torch.tensor([code_scale]), torch.tensor([code_zp]))
    return fields(points).view(NUM_CODES, 4).float()
