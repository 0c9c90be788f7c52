"""Stored WINT2 experts to the bytes that csrc/moe_wint2.cu streams, and back.

A record holds one pair of 16-channel tiles over all of K: gate and up of the same 16 features, or 32
neighbouring features of a down projection. K advances in steps of 128 (two 64-groups h):

    record   scales u32 [steps, 8], padded to 128 bytes | codes u8 [steps, tile 2, lane 32, 16]

    lane 4g+t holds, for h and r in {0, 1}, as bytes 4(2h+r)..4(2h+r)+3, codes 4t..4t+3 of group h of channel
    g + 8r; scale word g holds the local scales of channels g and g+8 as nibbles number 4·tile + 2h + r

so that a warp reads 512 consecutive bytes and every lane finds in its sixteen the operands of its own mma's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from cuda_kernels.formats import ccq
from cuda_kernels.formats.layout import KOrder

log = logging.getLogger(__name__)

TILE = 16  # channels of one tensor-core tile
STEP = 128  # of K; two 64-groups
FRACTION_BITS, SHORT_FRACTION_BITS = 17, 9
_FLOATS_LIMIT = 2**22 - 1  # of codes before they wrap, so that a float's mantissa holds them
_SEARCHED = 64  # multipliers tried at most on either side of the rounded one


class Arithmetic(IntEnum):
    """How the kernel makes the code of a byte b; wint2.cuh has the same names."""

    FLOATS = 0  # floor(fma(b, code_scale, code_zp + 1/2)), below 2^22 before it wraps
    INTEGERS = 1  # (b·A + B) >> 17
    SHORT = 2  # (b·A + B) >> 9 with A below 2^16: the cheapest
    WIDE_FLOATS = 3  # floats of any size


@dataclass(frozen=True, eq=False)
class PackedWint2:
    """All experts' weights of a projection as the kernel reads them: E experts, P pairs, K padded to STEP."""

    records: Tensor  # u8 [E, P, record bytes]
    channels: Tensor  # i32 [E, P, 8, 8]: A of (tile, r) = (0,0) (0,1) (1,0) (1,1), then B
    arithmetic: Tensor  # i32 [E, P]: of A and B (floats: the bits of code_scale and code_zp + 1/2)
    super_scales: Tensor  # f32 [E, P, 2, TILE]
    num_rows: int  # K, padded
    num_columns: int  # N as stored: gate and up counted both
    is_gated: bool
    k_order: KOrder

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.__dict__.values() if isinstance(value, Tensor))

    @property
    def num_experts(self) -> int:
        return self.records.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.records.shape[1]

    @property
    def num_steps(self) -> int:
        return self.num_rows // STEP

    @property
    def num_features(self) -> int:
        """Outputs of the projection after SwiGLU, if it is gated."""
        return self.num_columns // 2 if self.is_gated else self.num_columns

    def to(self, device: torch.device | str) -> "PackedWint2":
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "PackedWint2":
        changed: dict[str, Any] = {
            name: function(value) for name, value in self.__dict__.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def pack_wint2(
    quant_weight: Tensor,
    weight_scale: Tensor,
    super_scales: Tensor,
    code_scale: Tensor,
    code_zp: Tensor,
    *,
    is_gated: bool,
    k_order: KOrder = "shuffled",
) -> PackedWint2:
    """Packs stacked experts: u8 [E, K/4, N], u8 [E, K/128, N] and three [E, N], on the tensors' own device.

    A gated projection's columns are all gates, then all ups. They are padded with zero scales to whole tiles.
    """
    num_rows, num_columns = 4 * quant_weight.shape[1], quant_weight.shape[2]
    if num_rows % STEP:
        raise ValueError(f"quant_weight: {num_rows} rows, need a multiple of {STEP}")
    stored = (quant_weight, weight_scale, super_scales, code_scale, code_zp)
    pairs = [_paired(tensor, is_gated) for tensor in stored]
    records = torch.cat([_pack_scales(pairs[1]), _pack_codes(pairs[0])], dim=-1)
    channels, arithmetic = _pack_channels(pairs[3], pairs[4])
    return PackedWint2(
        records=records,
        channels=channels,
        arithmetic=arithmetic,
        super_scales=pairs[2].float().contiguous(),
        num_rows=num_rows,
        num_columns=num_columns,
        is_gated=is_gated,
        k_order=k_order,
    )


def unpack_codes(packed: PackedWint2) -> Tensor:
    """The stored bytes, u8 [E, K/4, N]."""
    codes = packed.records[:, :, _scale_bytes(packed.num_steps) :]
    lanes = codes.reshape(*codes.shape[:2], packed.num_steps, 2, 8, 4, 2, 2, 4)  # E P steps i g t h r j
    rows = lanes.permute(0, 2, 6, 5, 8, 1, 3, 7, 4)  # E steps h t j P i r g
    return _unpaired(rows.reshape(packed.num_experts, packed.num_rows // 4, -1, 2, TILE), packed)


def unpack_local_scales(packed: PackedWint2) -> Tensor:
    """The local scales of every 64-group, u8 [E, K/64, N]."""
    words = packed.records[:, :, : packed.num_steps * 32].contiguous().view(torch.int32)
    words = words.view(packed.num_experts, packed.num_pairs, packed.num_steps, 8, 1)
    nibbles = (words >> torch.arange(0, 32, 4, device=words.device) & 15).to(torch.uint8)
    nibbles = nibbles.view(*words.shape[:4], 2, 2, 2)  # E P steps g i h r
    groups = nibbles.permute(0, 2, 5, 1, 4, 6, 3)  # E steps h P i r g
    return _unpaired(groups.reshape(packed.num_experts, packed.num_rows // 64, -1, 2, TILE), packed)


def code_points(packed: PackedWint2) -> Tensor:
    """The 15-bit codes that the kernel makes of the 256 bytes, i16 [E, 256, N]."""
    constants = packed.channels.view(packed.num_experts, -1, 8, 2, 2, 2)  # E P g (A,B) i r
    constants = constants.permute(3, 0, 1, 4, 5, 2).reshape(2, packed.num_experts, -1, 2, TILE)
    kinds = packed.arithmetic[..., None, None].expand_as(constants[0])
    a, b, kind = (_unpaired(t.unsqueeze(1), packed) for t in (*constants, kinds))
    byte = torch.arange(ccq.NUM_CODES, device=a.device)[None, :, None]
    scale, offset = (constant.contiguous().view(torch.float32) for constant in (a, b))
    points = _float_codes(byte.float(), scale, offset)
    for exact, bits in ((Arithmetic.INTEGERS, FRACTION_BITS), (Arithmetic.SHORT, SHORT_FRACTION_BITS)):
        points = torch.where(kind == exact, byte * a.long() + b.long() >> bits, points)
    return (points & ccq.CODE_MASK).short()


def integer_constants(
    code_scale: Tensor, code_zp: Tensor, fraction_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A, B (i64 [N]) with (b·A + B) >> fraction_bits = code b for all 256 bytes b; and where there are such.

    For a multiplier A the allowed B are an interval, the intersection of one a byte; multipliers near
    code_scale·2^fraction_bits are tried until the interval is not empty. Two lines with the same floors at 0
    and 255 differ by less than 2 between these ends, which bounds the distance.
    """
    searched = min(_SEARCHED, 2 ** (fraction_bits + 1) // (ccq.NUM_CODES - 1) + 2)
    byte = torch.arange(ccq.NUM_CODES, dtype=torch.float32, device=code_scale.device).unsqueeze(1)
    codes = _float_codes(byte, code_scale, code_zp + 0.5)  # not yet modulo 2^15
    nearest = (code_scale.double() * 2**fraction_bits).round().long()
    a, b, found = nearest.clone(), torch.zeros_like(nearest), torch.zeros_like(nearest, dtype=torch.bool)
    for distance in sorted(range(-searched, searched + 1), key=abs):
        open_channels = (~found).nonzero().squeeze(1)
        if open_channels.numel() == 0:
            break
        multiplier = nearest[open_channels] + distance
        low, high = _offset_interval(codes[:, open_channels], multiplier, fraction_bits)
        fits = low <= high
        hit = open_channels[fits]
        a[hit], b[hit], found[hit] = multiplier[fits], low[fits], True
    return a, b, found


def _float_codes(byte: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    byte, scale, offset = torch.broadcast_tensors(byte, scale, offset)
    return ccq.fma(byte, scale, offset).nan_to_num().floor().long()


def _offset_interval(codes: Tensor, multiplier: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor]:
    byte = torch.arange(ccq.NUM_CODES, device=codes.device).unsqueeze(1)
    least: Tensor = (codes << fraction_bits) - byte * multiplier
    return least.amax(0), least.amin(0) + (1 << fraction_bits) - 1


def _float_kinds(scale: Tensor, offset: Tensor) -> Tensor:
    """Of pairs [E, P] whose codes are made by floats."""
    ends = offset.abs().maximum((scale * (ccq.NUM_CODES - 1) + offset).abs())
    is_narrow = (ends < _FLOATS_LIMIT).flatten(-2).all(-1)
    return torch.where(is_narrow, int(Arithmetic.FLOATS), int(Arithmetic.WIDE_FLOATS))


def _wrap(value: Tensor) -> Tensor:
    return (value & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _paired(tensor: Tensor, is_gated: bool) -> Tensor:
    """Columns [..., N] to [..., P, tile 2, TILE], zero-padded."""
    halves: Tensor = tensor.unflatten(-1, (2, -1)) if is_gated else tensor.unsqueeze(-2)
    unit = TILE if is_gated else 2 * TILE
    padded = torch.nn.functional.pad(halves, (0, -halves.shape[-1] % unit))
    tiles: Tensor = padded.unflatten(-1, (-1, TILE))
    return tiles.transpose(-3, -2) if is_gated else tiles.reshape(*tensor.shape[:-1], -1, 2, TILE)


def _unpaired(tensor: Tensor, packed: PackedWint2) -> Tensor:
    """[..., P, 2, TILE] to columns [..., N]."""
    if packed.is_gated:
        halves = tensor.transpose(-3, -2).flatten(-2)[..., : packed.num_features]
        return halves.flatten(-2)
    return tensor.flatten(-3)[..., : packed.num_columns]


def _scale_bytes(steps: int) -> int:
    return -(-steps * 32 // 128) * 128


def _pack_codes(codes: Tensor) -> Tensor:
    num_experts, _, num_pairs = codes.shape[:3]
    rows = codes.reshape(num_experts, -1, 2, 4, 4, num_pairs, 2, 2, 8)  # E steps h t j P i r g
    lanes = rows.permute(0, 5, 1, 6, 8, 3, 2, 7, 4)  # E P steps i g t h r j
    return lanes.reshape(num_experts, num_pairs, -1)


def _pack_scales(scales: Tensor) -> Tensor:
    num_experts, steps, num_pairs = scales.shape[:3]
    groups = torch.stack([scales >> 4, scales & 15], dim=2)  # E steps h P i 16: even groups are high nibbles
    nibbles = groups.reshape(num_experts, steps, 2, num_pairs, 2, 2, 8)  # E steps h P i r g
    words = nibbles.permute(0, 3, 1, 6, 4, 2, 5)  # E P steps g i h r
    low, high = words.reshape(num_experts, num_pairs, -1, 2).unbind(-1)
    packed = low | high << 4
    return torch.nn.functional.pad(packed, (0, _scale_bytes(steps) - packed.shape[-1]))


def _pack_channels(code_scale: Tensor, code_zp: Tensor) -> tuple[Tensor, Tensor]:
    """Constants and kinds of arithmetic: a pair takes the cheapest that is exact for all its channels."""
    scale, zp = code_scale.float().contiguous(), code_zp.float().contiguous()
    a, b = scale.view(torch.int32), (zp + 0.5).view(torch.int32)
    kinds = _float_kinds(scale, zp + 0.5)
    for kind, bits in ((Arithmetic.INTEGERS, FRACTION_BITS), (Arithmetic.SHORT, SHORT_FRACTION_BITS)):
        found_constants = integer_constants(scale.flatten(), zp.flatten(), bits)
        multiplier, offset, found = (constant.view(scale.shape) for constant in found_constants)
        if kind is Arithmetic.SHORT:
            found = found & (multiplier >= 0) & (multiplier < 2**16)
        elif not bool(found.all()):
            log.info("%d of %d channels have no exact integer form: floats", (~found).sum(), found.numel())
        exact = found.flatten(-2).all(-1)
        use = exact[..., None, None]
        a, b = torch.where(use, _wrap(multiplier), a), torch.where(use, _wrap(offset), b)
        kinds = torch.where(exact, int(kind), kinds)
    both = torch.stack([a, b], dim=2).unflatten(-1, (2, 8))  # E P (A,B) i r g
    return both.permute(0, 1, 5, 2, 3, 4).reshape(*scale.shape[:2], 8, 8).contiguous(), kinds.int()
