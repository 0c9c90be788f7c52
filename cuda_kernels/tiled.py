"""Weights of 2, 4, 8 or 16 bits in the order in which csrc/tiled_linear.cu streams them, and back.

    tiles   u8 [E, P pairs, C chunks, tile 2, lane 32, 16 bytes]        E experts, or 1

A pair is 32 neighbouring outputs, or 16 gates and the same 16 ups; csrc/tiled.cuh draws a lane's bytes.
A chunk is 128, 64, 32 or 16 steps of K. Outputs are padded to whole pairs, K to whole chunks, with zeros.

Two bits are WINT2T's, of experts. Beside a chunk's tiles lie its channels' local scales and history:

    tiles   u8 [E, P, C, 64 lanes of both tiles, then g 8, 16 bytes]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels.formats import wint2t
from cuda_kernels.formats.layout import GROUP_SIZE

Bits = Literal[2, 4, 8, 16]

TILE = 16  # outputs of one tensor-core tile
_LANE_BYTES = 16
_LANES = 64  # of a pair's two tiles
_NIBBLE_BIAS, _BYTE_BIAS = 8, 128


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """One projection of one or of E experts: level · scale of the output, or bfloat16 as it is."""

    tiles: Tensor
    scales: Tensor | None  # f32 [E, P, 2, TILE]; None for 16 bits
    bits: Bits
    num_inputs: int  # K
    num_outputs: int  # N; gate and up counted both
    is_gated: bool

    @property
    def num_experts(self) -> int:
        return self.tiles.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.tiles.shape[1]

    @property
    def num_chunks(self) -> int:
        return self.tiles.shape[2]

    @property
    def num_features(self) -> int:
        """Outputs after SwiGLU, if it is gated."""
        return self.num_outputs // 2 if self.is_gated else self.num_outputs

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def pack_tiled(
    weight_NK: Tensor, scale_N: Tensor | None = None, *, bits: Bits, is_gated: bool = False
) -> TiledWeight:
    """One projection: int8 levels with a scale an output, or bfloat16 without, on the tensors' own device.

    K must be a multiple of 8. Gates come first, then as many ups.
    """
    num_outputs, num_inputs = weight_NK.shape
    if num_inputs % 8:
        raise ValueError(f"weight: {num_inputs} inputs, the kernel needs a multiple of 8")
    lane_values = 8 * _LANE_BYTES // bits // 2
    padded = F.pad(weight_NK, (0, -num_inputs % (4 * lane_values)))
    rows = _to_pairs(padded, is_gated)  # P tile r g K
    lanes = rows.unflatten(-1, (-1, 4, lane_values)).permute(0, 4, 1, 3, 5, 2, 6)  # P C tile g t r k
    tiles = _to_bytes(lanes.contiguous(), bits).flatten(3, 4).flatten(4)
    scales = None if scale_N is None else _pack_scales(scale_N, is_gated)
    return TiledWeight(tiles.unsqueeze(0), scales, bits, num_inputs, num_outputs, is_gated)


def pack_trellis(
    quant_weight: Tensor,
    weight_scale: Tensor,
    super_scales: Tensor,
    *,
    num_inputs: int,
    is_gated: bool = False,
) -> TiledWeight:
    """One projection from WINT2T's tensors, whose first `num_inputs` rows, a multiple of 8, are real."""
    if num_inputs % 8:
        raise ValueError(f"quant_weight: {num_inputs} inputs, the kernel needs a multiple of 8")
    codes = _to_pairs(quant_weight.T, is_gated).unflatten(-1, (-1, 4, 2, 4))  # P tile r g C t word byte
    lanes = codes.flip(-1).permute(0, 4, 1, 3, 5, 2, 6, 7).flatten(2, 4).flatten(3)
    history = F.pad(codes.flatten(-3)[..., :-1, -2:].flip(-1), (0, 0, 1, 0))  # P tile r g C 2
    local = _to_pairs(weight_scale.T, is_gated).unsqueeze(-1)
    beside = F.pad(torch.cat([history, local], dim=-1), (0, 1)).permute(0, 4, 3, 1, 2, 5).flatten(3)
    tiles = torch.cat([lanes, beside], dim=2).unsqueeze(0)
    scales = _pack_scales(super_scales, is_gated)
    return TiledWeight(tiles, scales, 2, num_inputs, quant_weight.shape[1], is_gated)


def stack_tiled(weights: list[TiledWeight]) -> TiledWeight:
    """The experts' projections as one."""
    first = weights[0]
    scales = None if first.scales is None else torch.cat([w.scales for w in weights if w.scales is not None])
    tiles = torch.cat([weight.tiles for weight in weights])
    return TiledWeight(tiles, scales, first.bits, first.num_inputs, first.num_outputs, first.is_gated)


def unpack_tiled(weight: TiledWeight, expert: int = 0) -> Tensor:
    """The expert's weight as float32 [N, K]."""
    tiles = weight.tiles[expert]
    values = _trellis_values(tiles) if weight.bits == 2 else _plain_values(tiles, weight.bits)
    if weight.scales is not None:
        values = values * weight.scales[expert].unflatten(-1, (2, 8)).unsqueeze(-1)
    return _from_pairs(values, weight)[:, : weight.num_inputs]


def _plain_values(tiles: Tensor, bits: Bits) -> Tensor:
    """Levels, or bfloat weights, f32 [P, tile, r, g, K]."""
    lanes = tiles.unflatten(3, (8, 4)).unflatten(5, (2, -1))  # P C tile g t r bytes
    return _from_bytes(lanes, bits).permute(0, 2, 5, 3, 1, 4, 6).flatten(4)


def _trellis_values(tiles: Tensor) -> Tensor:
    """Level times local scale, f32 [P, tile, r, g, K]."""
    lanes = tiles[:, :, :_LANES].unflatten(3, (2, 2, 4)).flip(-1).unflatten(2, (2, 8, 4))
    codes = lanes.permute(0, 2, 5, 3, 1, 4, 6, 7).flatten(4)  # from P C tile g t r word byte
    local = tiles[:, :, _LANES:].unflatten(3, (2, 2, 4))[..., 2].permute(0, 3, 4, 2, 1)
    columns = codes.flatten(0, 3).T, local.flatten(0, 3).T
    levels, scales = wint2t.unpack(wint2t.Wint2tWeight(*columns, torch.ones(len(columns[0].T))))
    values = levels.float() * scales.repeat_interleave(GROUP_SIZE, dim=0)
    columns_of_rows: Tensor = values.T.unflatten(0, codes.shape[:4])
    return columns_of_rows


def _pack_scales(scale_N: Tensor, is_gated: bool) -> Tensor:
    return _to_pairs(scale_N.float().unsqueeze(1), is_gated).flatten(2).unsqueeze(0).contiguous()


def _to_pairs(rows: Tensor, is_gated: bool) -> Tensor:
    """[N, ...] to [P, tile 2, r 2, g 8, ...], zero-padded."""
    halves = rows.unflatten(0, (2, -1)) if is_gated else rows.unsqueeze(0)
    missing = -halves.shape[1] % (TILE if is_gated else 2 * TILE)
    padded = F.pad(halves, (0, 0, 0, missing))
    pairs: Tensor = padded.unflatten(1, (-1, 2, 8)) if is_gated else padded.unflatten(1, (-1, 2, 2, 8))
    return pairs.transpose(0, 1) if is_gated else pairs.squeeze(0)


def _from_pairs(values: Tensor, weight: TiledWeight) -> Tensor:
    if weight.is_gated:
        return values.transpose(0, 1).flatten(1, 3)[:, : weight.num_features].flatten(0, 1)
    return values.flatten(0, 3)[: weight.num_outputs]


def _to_bytes(lanes: Tensor, bits: Bits) -> Tensor:
    """Values of one row's share of a lane (the last axis) to its eight bytes."""
    if bits == 16:
        return lanes.to(torch.bfloat16).view(torch.uint8)
    if bits == 8:
        return (lanes.short() + _BYTE_BIAS).to(torch.uint8)
    nibbles: Tensor = (lanes + _NIBBLE_BIAS).to(torch.uint8).unflatten(-1, (2, 4, 2)).transpose(-1, -2)
    pairs = nibbles.reshape(*lanes.shape[:-1], 8, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _from_bytes(data: Tensor, bits: Bits) -> Tensor:
    if bits == 16:
        return data.contiguous().view(torch.bfloat16).float()
    if bits == 8:
        return data.float() - _BYTE_BIAS
    nibbles: Tensor = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).unflatten(-1, (2, 2, 4))
    return nibbles.transpose(-1, -2).flatten(-3).float() - _NIBBLE_BIAS
