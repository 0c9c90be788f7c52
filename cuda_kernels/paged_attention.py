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

from cuda_kernels.attention_kernels import Step, attention_by_token, has_kernel, launch_attention
from cuda_kernels.cache_format import CacheScales, gather_blocks
from cuda_kernels.compiled import cpu
from cuda_kernels.launch import cuda_device

# MKL gives a row of a product the same bits beside any other rows if their number is a multiple of four.
_ROW_MULTIPLE = 4
_PREFILL_TILE_TOKENS = 64
# Bounds the memory for scores and gathered keys: this many items at a time.
_MAX_ITEMS = 512


@dataclass(frozen=True, slots=True)
class _Part:
    """Tiles of Q tokens, those with the most blocks first, and their items, block index by block index."""

    tile_size: int  # Q
    token_UQ: torch.Tensor  # rows in T, clamped past a tile's end
    is_real_UQ: torch.Tensor
    active: tuple[int, ...]  # of each block index, how many tiles reach it: tiles 0 .. active - 1
    tile_I: torch.Tensor
    block_I: torch.Tensor  # in the cache
    is_future_I1RP: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's attention visits, the same in every layer."""

    parts: tuple[_Part, ...]


def is_compiled(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether compiled code attends on a CPU, which needs no plan."""
    return cpu is not None and head_dim % 64 == 0 and dtype == torch.float32


def plan_attention(
    block_tables_SM: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    max_query_len: int,
    block_size: int,
    num_heads_per_kv_head: int,
) -> AttentionPlan | None:
    """The plan of a step on a CPU; None on a GPU, whose kernel finds its own way."""
    if block_tables_SM.is_cuda:
        return None
    planner = _Planner(block_tables_SM.long(), block_size, num_heads_per_kv_head)
    tilings = _tilings(cu_seqlens_q.long(), context_lens_S.long(), max_query_len, block_size)
    return AttentionPlan(tuple(planner.part(tiles) for tiling in tilings for tiles in _bounded(tiling)))


def paged_attention(
    query_THC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    block_tables_SM: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    max_query_len: int,
    scale: float,
    plan: AttentionPlan | None = None,
    scales: CacheScales | None = None,
) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + causal mask) V over each sequence's cached tokens: [T, H, C].

    Query i of a sequence sits at position `context_len - query_len + i`; `context_lens_S` counts the step's
    own tokens, whose keys and values are already stored. Softmax and sums are float32. `plan`, of the same
    step, spares making it again in every layer; `scales` are those of caches that hold levels.
    """
    caches = key_cache_BPGC, value_cache_BPGC
    if query_THC.is_cuda:
        step = Step(*caches, block_tables_SM, cu_seqlens_q, context_lens_S, scales)
        if not has_kernel(query_THC, step):
            return attention_by_token(query_THC, step, scale)
        return launch_attention(cuda_device(query_THC.device.index), query_THC, step, max_query_len, scale)
    if is_compiled(query_THC.shape[-1], query_THC.dtype):
        return cpu.attention(query_THC, *caches, block_tables_SM, cu_seqlens_q, context_lens_S, scale, scales)
    plan = plan or plan_attention(
        block_tables_SM,
        cu_seqlens_q,
        context_lens_S,
        max_query_len,
        key_cache_BPGC.shape[1],
        query_THC.shape[1] // key_cache_BPGC.shape[2],
    )
    assert plan is not None
    out_THC = torch.zeros_like(query_THC)
    for part in plan.parts:
        _attend(out_THC, query_THC, caches, scales or (None, None), part, scale)
    return out_THC


def _attend(
    out_THC: torch.Tensor,
    query_THC: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    part: _Part,
    scale: float,
) -> None:
    query_UGRC = _tile_queries(query_THC[part.token_UQ].float() * scale, caches[0].shape[2])
    keys_IGPC = gather_blocks(caches[0], scales[0], part.block_I)
    scores_IGRP = _products(query_UGRC.index_select(0, part.tile_I), keys_IGPC.transpose(-1, -2))
    scores_IGRP.masked_fill_(part.is_future_I1RP, -torch.inf)
    weights_IGRP = _exp_below_tile_maximum(scores_IGRP, part)
    products_IGRC = _products(weights_IGRP, gather_blocks(caches[1], scales[1], part.block_I))
    sums_UGRC = _fold(torch.add, products_IGRC, part.active)
    totals_UGR1 = _fold(torch.add, weights_IGRP.sum(-1, keepdim=True), part.active)
    result_UQHC = _untile(sums_UGRC / totals_UGR1, part.tile_size, query_THC.shape[1])
    out_THC[part.token_UQ[part.is_real_UQ]] = result_UQHC[part.is_real_UQ].to(out_THC.dtype)


def _tile_queries(query_UQHC: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[U, Q, H, C] -> [U, G, R, C], R = query heads of a KV head × Q, padded to a multiple of four."""
    num_tiles, size, num_heads, head_dim = query_UQHC.shape
    by_head = query_UQHC.view(num_tiles, size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query_UGRC = by_head.permute(0, 2, 3, 1, 4).reshape(num_tiles, num_kv_heads, -1, head_dim)
    missing = -query_UGRC.shape[2] % _ROW_MULTIPLE
    return F.pad(query_UGRC, (0, 0, 0, missing)) if missing else query_UGRC


def _untile(result_UGRC: torch.Tensor, tile_size: int, num_heads: int) -> torch.Tensor:
    """The inverse of `_tile_queries`: [U, Q, H, C]."""
    num_tiles, num_kv_heads, _, head_dim = result_UGRC.shape
    group = num_heads // num_kv_heads
    result = result_UGRC[:, :, : group * tile_size]
    by_head = result.reshape(num_tiles, num_kv_heads, group, tile_size, head_dim)
    return by_head.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _products(a_IGRX: torch.Tensor, b_IGXY: torch.Tensor) -> torch.Tensor:
    products = torch.bmm(a_IGRX.flatten(0, 1), b_IGXY.flatten(0, 1))
    return products.view(*a_IGRX.shape[:3], -1)


def _exp_below_tile_maximum(scores_IGRP: torch.Tensor, part: _Part) -> torch.Tensor:
    maximum_UGR1 = _fold(torch.maximum, scores_IGRP.amax(-1, keepdim=True), part.active)
    return scores_IGRP.sub_(maximum_UGR1.index_select(0, part.tile_I)).exp_()


def _fold(
    combine: Callable[..., torch.Tensor], items_I: torch.Tensor, active: tuple[int, ...]
) -> torch.Tensor:
    """Combine the items of each tile in the order of their blocks."""
    if len(active) == 1:
        return items_I
    first, *rest = torch.split(items_I, list(active))
    total_U: torch.Tensor = first.clone()
    for items in rest:
        beginning = total_U[: len(items)]
        combine(beginning, items, out=beginning)
    return total_U


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Query tiles of equal size, those with the most blocks first."""

    size: int
    sequence_U: torch.Tensor
    first_row_U: torch.Tensor  # in T
    first_position_U: torch.Tensor
    num_queries_U: torch.Tensor
    num_blocks_U: torch.Tensor

    def __getitem__(self, which: slice | torch.Tensor) -> _Tiles:
        return _Tiles(
            self.size,
            self.sequence_U[which],
            self.first_row_U[which],
            self.first_position_U[which],
            self.num_queries_U[which],
            self.num_blocks_U[which],
        )


def _tilings(
    cu_seqlens: torch.Tensor, context_lens_S: torch.Tensor, max_query_len: int, block_size: int
) -> Iterator[_Tiles]:
    """Decodes as tiles of one token, prefill chunks as tiles of many."""
    query_lens_S = cu_seqlens.diff()
    first_positions_S = (context_lens_S - query_lens_S).clamp(min=0)
    kinds = [(1, query_lens_S == 1), (_PREFILL_TILE_TOKENS, query_lens_S > 1)]
    for size, is_member_S in kinds[: 1 if max_query_len == 1 else 2]:
        members = is_member_S.nonzero().squeeze(1)
        num_tiles = (query_lens_S[members] + size - 1) // size
        sequence_U = members.repeat_interleave(num_tiles)
        tile_starts = (num_tiles.cumsum(0) - num_tiles).repeat_interleave(num_tiles)
        offset_U = (torch.arange(len(sequence_U)) - tile_starts) * size
        num_queries_U = (query_lens_S[sequence_U] - offset_U).clamp(max=size)
        first_position_U = first_positions_S[sequence_U] + offset_U
        num_blocks_U = (first_position_U + num_queries_U + block_size - 1) // block_size
        first_row_U = cu_seqlens[sequence_U] + offset_U
        tiles = _Tiles(size, sequence_U, first_row_U, first_position_U, num_queries_U, num_blocks_U)
        yield tiles[num_blocks_U.argsort(descending=True)]


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


@dataclass(frozen=True, slots=True)
class _Planner:
    block_tables_SM: torch.Tensor
    block_size: int
    num_heads_per_kv_head: int

    def part(self, tiles: _Tiles) -> _Part:
        """The tokens and the items of some tiles."""
        offset_Q = torch.arange(tiles.size)
        last_row_U1 = (tiles.first_row_U + tiles.num_queries_U - 1).unsqueeze(1)
        block_J = torch.arange(int(tiles.num_blocks_U[0]))
        active_J = (tiles.num_blocks_U > block_J.unsqueeze(1)).sum(1)
        index_I = block_J.repeat_interleave(active_J)
        tile_I = torch.arange(len(index_I)) - (active_J.cumsum(0) - active_J)[index_I]
        return _Part(
            tiles.size,
            torch.minimum(tiles.first_row_U.unsqueeze(1) + offset_Q, last_row_U1),
            offset_Q < tiles.num_queries_U.unsqueeze(1),
            tuple(active_J.tolist()),
            tile_I,
            self.block_tables_SM[tiles.sequence_U[tile_I], index_I],
            self._is_future(tiles, tile_I, index_I),
        )

    def _is_future(self, tiles: _Tiles, tile_I: torch.Tensor, index_I: torch.Tensor) -> torch.Tensor:
        """Where a key's position lies after the query's: [I, 1, R, P]."""
        num_rows = self.num_heads_per_kv_head * tiles.size
        num_rows += -num_rows % _ROW_MULTIPLE
        row_offset_R1 = (torch.arange(num_rows) % tiles.size).unsqueeze(1)
        distance_I = tiles.first_position_U[tile_I] - index_I * self.block_size
        return torch.arange(self.block_size) > distance_I.view(-1, 1, 1, 1) + row_offset_R1
