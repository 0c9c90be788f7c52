"""Op `paged_attention`: causal attention of a step's queries over the paged KV cache.

A step is cut into query tiles, each within one sequence, and every tile visits the cache blocks it may see:

    tile u of sequence s      blocks 0 .. ceil((last position + 1) / P) - 1 of s
    item = (tile, block)      scores [R, P] = queries · keysᵀ, R = tokens of a tile × query heads per KV head

Items are computed all at once and summed block by block in order, so that a token's result has the same bits
in any batch and any chunking.
Shapes: T tokens, S sequences, H query heads, G KV heads, C head dim, B blocks, P slots in a block,
M blocks of the longest sequence, U tiles, I items, Q tokens in a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# MKL gives a row of a product the same bits beside any other rows if their number is a multiple of four.
_ROW_MULTIPLE = 4
_PREFILL_TILE_TOKENS = 64
# Bounds the memory for scores and gathered keys: this many items at a time.
_MAX_ITEMS = 512


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Query tiles of equal size, those with the most blocks first."""

    sequence_U: torch.Tensor
    first_row_U: torch.Tensor  # in T
    first_position_U: torch.Tensor
    num_blocks_U: torch.Tensor
    num_queries_U: torch.Tensor
    size: int  # Q

    def __getitem__(self, part: slice | torch.Tensor) -> _Tiles:
        return _Tiles(
            self.sequence_U[part],
            self.first_row_U[part],
            self.first_position_U[part],
            self.num_blocks_U[part],
            self.num_queries_U[part],
            self.size,
        )


def paged_attention(
    query_THC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    block_tables_SM: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + causal mask) V over each sequence's cached tokens: [T, H, C].

    Query i of a sequence sits at position `context_len - query_len + i`; `context_lens_S` counts the step's
    own tokens, whose keys and values are already stored. Softmax and sums are float32.
    """
    out_THC = torch.zeros_like(query_THC)
    for tiles in _cut(cu_seqlens_q.long(), context_lens_S.long(), max_query_len, key_cache_BPGC.shape[1]):
        for part in _bounded(tiles):
            _attend(out_THC, query_THC, key_cache_BPGC, value_cache_BPGC, block_tables_SM, part, scale)
    return out_THC


def _cut(
    cu_seqlens: torch.Tensor, context_lens_S: torch.Tensor, max_query_len: int, block_size: int
) -> Iterator[_Tiles]:
    """Decodes as tiles of one token, prefill chunks as tiles of many."""
    first_rows_S, query_lens_S = cu_seqlens[:-1], cu_seqlens.diff()
    first_positions_S = (context_lens_S - query_lens_S).clamp(min=0)
    sequences_S = torch.arange(len(query_lens_S))
    for size, members in _by_tile_size(query_lens_S, sequences_S, max_query_len):
        num_tiles = (query_lens_S[members] + size - 1) // size
        sequence_U = members.repeat_interleave(num_tiles)
        tile_starts = num_tiles.cumsum(0) - num_tiles
        offset_U = (torch.arange(len(sequence_U)) - tile_starts.repeat_interleave(num_tiles)) * size
        num_queries_U = (query_lens_S[sequence_U] - offset_U).clamp(max=size)
        first_position_U = first_positions_S[sequence_U] + offset_U
        num_blocks_U = (first_position_U + num_queries_U + block_size - 1) // block_size
        first_row_U = first_rows_S[sequence_U] + offset_U
        tiles = _Tiles(sequence_U, first_row_U, first_position_U, num_blocks_U, num_queries_U, size)
        yield tiles[num_blocks_U.argsort(descending=True)]


def _by_tile_size(
    query_lens_S: torch.Tensor, sequences_S: torch.Tensor, max_query_len: int
) -> Iterator[tuple[int, torch.Tensor]]:
    if max_query_len == 1:
        yield 1, sequences_S[query_lens_S > 0]
        return
    yield 1, sequences_S[query_lens_S == 1]
    yield _PREFILL_TILE_TOKENS, sequences_S[query_lens_S > 1]


def _bounded(tiles: _Tiles) -> Iterator[_Tiles]:
    """Runs of tiles with at most `_MAX_ITEMS` items each (a tile with more stands alone)."""
    start, items = 0, 0
    for index, num_blocks in enumerate(tiles.num_blocks_U.tolist()):
        if items and items + num_blocks > _MAX_ITEMS:
            yield tiles[start:index]
            start, items = index, 0
        items += num_blocks
    if items:
        yield tiles[start:]


def _attend(
    out_THC: torch.Tensor,
    query_THC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    block_tables_SM: torch.Tensor,
    tiles: _Tiles,
    scale: float,
) -> None:
    num_kv_heads = key_cache_BPGC.shape[2]
    token_UQ, is_real_UQ = _tile_tokens(tiles, query_THC.shape[0])
    query_UGRC = _tile_queries(query_THC[token_UQ].float() * scale, num_kv_heads)
    active, tile_I, block_I = _items(tiles.num_blocks_U)
    physical_I = block_tables_SM[tiles.sequence_U[tile_I], block_I].long()
    scores_IGRP = _products(query_UGRC[tile_I], _gather(key_cache_BPGC, physical_I).transpose(-1, -2))
    _mask_future(scores_IGRP, tiles, tile_I, block_I)
    weights_IGRP = _exp_below_tile_maximum(scores_IGRP, tile_I, active)
    sums_UGRC = _fold(torch.add, _products(weights_IGRP, _gather(value_cache_BPGC, physical_I)), active)
    totals_UGR = _fold(torch.add, weights_IGRP.sum(-1), active)
    result_UQHC = _untile(sums_UGRC / totals_UGR.unsqueeze(-1), tiles.size, query_THC.shape[1])
    out_THC[token_UQ[is_real_UQ]] = result_UQHC[is_real_UQ].to(out_THC.dtype)


def _tile_tokens(tiles: _Tiles, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's rows in T (clamped past its end) and which of them are its own."""
    offset_Q = torch.arange(tiles.size)
    token_UQ = (tiles.first_row_U.unsqueeze(1) + offset_Q).clamp(max=num_tokens - 1)
    return token_UQ, offset_Q < tiles.num_queries_U.unsqueeze(1)


def _tile_queries(query_UQHC: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[U, Q, H, C] -> [U, G, R, C], R = query heads of a KV head × Q, padded to a multiple of four."""
    num_tiles, _, _, head_dim = query_UQHC.shape
    query_UGRC: torch.Tensor = (
        query_UQHC.unflatten(2, (num_kv_heads, -1))
        .permute(0, 2, 3, 1, 4)
        .reshape(num_tiles, num_kv_heads, -1, head_dim)
    )
    return F.pad(query_UGRC, (0, 0, 0, -query_UGRC.shape[2] % _ROW_MULTIPLE))


def _untile(result_UGRC: torch.Tensor, tile_size: int, num_heads: int) -> torch.Tensor:
    """The inverse of `_tile_queries`: [U, Q, H, C]."""
    group = num_heads // result_UGRC.shape[1]
    result_UGHQC: torch.Tensor = result_UGRC[:, :, : group * tile_size].unflatten(2, (group, tile_size))
    return result_UGHQC.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _items(num_blocks_U: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """How many tiles reach each block index, and every item's tile and block index, ordered by block index.

    Tiles come with the most blocks first: those that reach block j are tiles 0 .. active[j] - 1.
    """
    block_J = torch.arange(int(num_blocks_U[0]))
    active_J = (num_blocks_U > block_J.unsqueeze(1)).sum(1)
    block_I = block_J.repeat_interleave(active_J)
    starts_J = active_J.cumsum(0) - active_J
    tile_I = torch.arange(len(block_I)) - starts_J[block_I]
    return active_J.tolist(), tile_I, block_I


def _gather(cache_BPGC: torch.Tensor, block_I: torch.Tensor) -> torch.Tensor:
    """The blocks of the items, head by head: [I, G, P, C] float32."""
    return cache_BPGC[block_I].transpose(1, 2).contiguous().float()


def _products(a_IGRX: torch.Tensor, b_IGXY: torch.Tensor) -> torch.Tensor:
    products = torch.bmm(a_IGRX.flatten(0, 1), b_IGXY.flatten(0, 1))
    return products.view(*a_IGRX.shape[:3], -1)


def _mask_future(
    scores_IGRP: torch.Tensor, tiles: _Tiles, tile_I: torch.Tensor, block_I: torch.Tensor
) -> None:
    """Minus infinity where a key's position lies after the query's."""
    _, _, num_rows, block_size = scores_IGRP.shape
    first_key_I = block_I * block_size
    row_offset_R = torch.arange(num_rows) % tiles.size
    query_position_IR = tiles.first_position_U[tile_I].unsqueeze(1) + row_offset_R
    distance_IR = query_position_IR - first_key_I.unsqueeze(1)
    is_future_IRP = torch.arange(block_size) > distance_IR.unsqueeze(-1)
    scores_IGRP.masked_fill_(is_future_IRP.unsqueeze(1), -torch.inf)


def _exp_below_tile_maximum(
    scores_IGRP: torch.Tensor, tile_I: torch.Tensor, active: list[int]
) -> torch.Tensor:
    maximum_UGR = _fold(torch.maximum, scores_IGRP.amax(-1), active)
    return scores_IGRP.sub_(maximum_UGR[tile_I].unsqueeze(-1)).exp_()


def _fold(combine: Callable[..., torch.Tensor], parts_I: torch.Tensor, active: list[int]) -> torch.Tensor:
    """Combine the items of each tile in the order of their blocks."""
    first, *rest = torch.split(parts_I, active)
    total_U: torch.Tensor = first.clone()
    for part in rest:
        beginning = total_U[: len(part)]
        combine(beginning, part, out=beginning)
    return total_U
