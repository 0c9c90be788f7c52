"""Weights of 4, 8 or 16 bits in the order in which csrc/tiled_linear.cu streams them, and back.

    tiles   u8 [E, P pairs, C chunks, tile 2, lane 32, 16 bytes]        E experts, or 1

A pair is 32 neighbouring outputs, or 16 gates and the same 16 ups; csrc/tiled.cuh draws a lane's bytes.
A chunk is 64, 32 or 16 steps of K. Outputs are padded to whole pairs, K to whole chunks, with zero weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8, 16]

TILE = 16  # outputs of one tensor-core tile
_LANE_BYTES = 16
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
    scales = None if scale_N is None else _to_pairs(scale_N.float().unsqueeze(1), is_gated).flatten(2)
    return TiledWeight(
        tiles.unsqueeze(0),
        None if scales is None else scales.unsqueeze(0).contiguous(),
        bits,
        num_inputs,
        num_outputs,
        is_gated,
    )


def stack_tiled(weights: list[TiledWeight]) -> TiledWeight:
    """The experts' projections as one."""
    first = weights[0]
    scales = None if first.scales is None else torch.cat([w.scales for w in weights if w.scales is not None])
    tiles = torch.cat([weight.tiles for weight in weights])
    return TiledWeight(tiles, scales, first.bits, first.num_inputs, first.num_outputs, first.is_gated)


def unpack_tiled(weight: TiledWeight, expert: int = 0) -> Tensor:
    """The expert's weight as float32 [N, K]."""
    lanes = weight.tiles[expert].unflatten(3, (8, 4)).unflatten(5, (2, -1))  # P C tile g t r bytes
    values = _from_bytes(lanes, weight.bits).permute(0, 2, 5, 3, 1, 4, 6).flatten(4)  # P tile r g K
    if weight.scales is not None:
        values = values * weight.scales[expert].unflatten(-1, (2, 8)).unsqueeze(-1)
    return _from_pairs(values, weight)[:, : weight.num_inputs]


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
