"""Compiled attention over the paged KV cache, 64 keys at a time with a running softmax.

An item is a run of query tokens of one sequence and one KV head: rows are its tokens times the query heads of
that KV head. For every 64 keys, in the order of their positions:

    scores = queries · keysᵀ        a panel product over the keys, transposed into a panel of 64 columns
    weights, rescaled sums          elementwise.soften_row, causal mask included
    out   += weights · values       a panel product over the values where they lie in the cache

Of a cache that does not hold float32, each 64 keys and then values are first expanded next to the job.

A row's chain of operations depends on its own position only: it has the same bits in any batch and chunking.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from cuda_kernels.cpu.arrays import Floats, Ints, SmallInts
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.elementwise import clear_row, divide_row, soften_row, transpose
from cuda_kernels.cpu.kernels import multiply
from cuda_kernels.cpu.linear import PANEL_BYTES
from cuda_kernels.cpu.team import enter, run, take
from cuda_kernels.cpu.vector import LANES, keep, pointer

_TILE_TOKENS = 16
_TILE_KEYS = 64
# Rows of the table of addresses.
_QUERY, _OUT, _SCORES, _KEYS = range(4)
# What a job is given: its counter, kernels, scale; query, out, cache, heads; tiles; the step.
_NUM_GIVEN = 25
# How the cache keeps a number: as a float32, as a bfloat16, as a level of int8 or of another byte.
FLOAT32, BFLOAT16, INT8, BYTE = range(4)


@compiled
def _keys_to_panel(rows: Ints, num_keys: int, head_bytes: int, panel: int) -> None:
    """Key rows to columns of a panel; past `num_keys`, where nobody looks, some repeat the last key."""
    lanes = np.empty(LANES, np.int64)
    for block in range(0, num_keys, LANES):
        for lane in range(LANES):
            lanes[lane] = rows[min(block + lane, num_keys - 1)]
        for at in range(0, head_bytes, 4 * LANES):
            transpose(lanes.ctypes.data, at, panel + at // 4 * PANEL_BYTES + block * 4)
    keep(lanes)


@compiled
def _find_keys(
    rows: Ints, first: int, count: int, keys: int, slot_bytes: int, blocks: SmallInts, block_size: int
) -> None:
    for key in range(count):
        position = first + key
        slot = np.int64(blocks[position // block_size]) * block_size + position % block_size
        rows[key] = keys + slot * slot_bytes


@compiled
def _expand_row(source: int, width: int, kind: int, scale: np.float32, values: Floats, target: int) -> None:
    """One head of a token as float32; `values` are those of each byte."""
    row = carray(pointer(target), (width,), np.float32)
    if kind == BFLOAT16:
        bits = carray(pointer(target), (width,), np.uint32)
        halves = carray(pointer(source), (width,), np.uint16)
        for i in range(width):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    elif kind == INT8:
        levels = carray(pointer(source), (width,), np.int8)
        for i in range(width):
            row[i] = np.float32(levels[i]) * scale
    else:
        codes = carray(pointer(source), (width,), np.uint8)
        for i in range(width):
            row[i] = values[codes[i]] * scale


@compiled
def _expand(
    rows: Ints,
    first: int,
    count: int,
    width: int,
    blocks: SmallInts,
    block_size: int,
    form: tuple[int, int, int],
    scales: int,
    room: Floats,
) -> None:
    """The rows' values in `room`, to which their addresses then point.

    `form`: kind, address of the bytes' values, slots from a block's scales to the next one's.
    """
    kind, values, block_scales = form
    values_256 = carray(pointer(values), (256,), np.float32)
    for key in range(count):
        position, scale = first + key, np.float32(1)
        if kind >= INT8:
            at = np.int64(blocks[position // block_size]) * block_scales + position % block_size
            scale = carray(pointer(scales + 4 * at), (1,), np.float32)[0]
        target = room.ctypes.data + key * width * 4
        _expand_row(rows[key], width, kind, scale, values_256, target)
        rows[key] = target


@compiled
def _find(
    rows: Ints,
    first: int,
    count: int,
    width: int,
    source: int,
    where: tuple[int, SmallInts, int],
    form: tuple[int, int, int],
    scales: int,
    room: Floats,
) -> None:
    """Addresses of keys or values as float32; `where`: bytes of a slot, blocks, slots of a block."""
    slot_bytes, blocks, block_size = where
    _find_keys(rows, first, count, source, slot_bytes, blocks, block_size)
    if form[0] != FLOAT32:
        _expand(rows, first, count, width, blocks, block_size, form, scales, room)


@compiled
def _advance(addresses: Ints, count: int, num_bytes: int) -> None:
    for index in range(count):
        addresses[index] += num_bytes


@compiled
def _add_values(kernel: int, rows: Ints, num_rows: int, head_bytes: int, num_keys: int) -> None:
    """out += weights · values, 64 features at a time; the rows' addresses of `out` and values move along."""
    for column in range(0, head_bytes, PANEL_BYTES):
        if column:
            _advance(rows[_KEYS], num_keys, PANEL_BYTES)
            _advance(rows[_OUT], num_rows, PANEL_BYTES)
        weights, out = rows[_SCORES].ctypes.data, rows[_OUT].ctypes.data
        multiply(kernel, weights, out, num_rows, rows[_KEYS].ctypes.data, 0, num_keys, 1)
    _advance(rows[_OUT], num_rows, PANEL_BYTES - head_bytes)


@compiled
def _attend(
    kernels: tuple[int, int],
    rows: Ints,
    states: Floats,
    panel: Floats,
    num_rows: int,
    group: int,
    span: tuple[int, int],
    cache: tuple[int, int, int, int],
    form: tuple[int, int, int],
    scales: tuple[int, int],
    room: Floats,
    blocks: SmallInts,
    head_bytes: int,
    scale: int,
) -> None:
    """One item: `group` rows a token; `span` the position of its first token, and the keys up to its last.

    `scales`: addresses of the head's for keys and values, if it has any.
    """
    first_position, num_keys = span
    keys, values, slot_bytes, block_size = cache
    width = head_bytes // 4
    for row in range(num_rows):
        clear_row(rows[_OUT, row], width)
        states[row, 0], states[row, 1] = -np.inf, 0.0
    for first in range(0, num_keys, _TILE_KEYS):
        count = min(_TILE_KEYS, num_keys - first)
        where = slot_bytes, blocks, block_size
        _find(rows[_KEYS], first, count, width, keys, where, form, scales[0], room)
        _keys_to_panel(rows[_KEYS], count, head_bytes, panel.ctypes.data)
        query, scores = rows[_QUERY].ctypes.data, rows[_SCORES].ctypes.data
        multiply(kernels[0], query, scores, num_rows, panel.ctypes.data, 0, width, 0)
        for row in range(num_rows):
            seen = first_position + row // group + 1 - first
            soften_row(rows[_SCORES, row], seen, scale, states[row].ctypes.data, rows[_OUT, row], width)
        _find(rows[_KEYS], first, count, width, values, where, form, scales[1], room)
        _add_values(kernels[1], rows, num_rows, head_bytes, count)
    for row in range(num_rows):
        divide_row(rows[_OUT, row], states[row].ctypes.data + 4, width)


def job(arguments: int) -> None:
    """Take items until there is none left."""
    given = carray(pointer(arguments), (_NUM_GIVEN,), np.int64)
    kernels, scale = (given[1], given[2]), given[3]
    query, query_stride, out, out_stride = given[4], given[5], given[6], given[7]
    keys, values, block_size = given[8], given[9], given[10]
    num_heads, num_kv_heads, head_bytes = given[11], given[12], given[13]
    tiles = carray(pointer(given[14]), (given[15], 2), np.int64)
    block_tables = carray(pointer(given[17]), (given[16], given[18]), np.int32)
    cu_seqlens = carray(pointer(given[19]), (given[16] + 1,), np.int32)
    context_lens = carray(pointer(given[20]), (given[16],), np.int32)
    form = given[21], given[22], num_kv_heads * block_size
    group = num_heads // num_kv_heads
    max_rows = _TILE_TOKENS * group
    rows = np.empty((4, max(max_rows, _TILE_KEYS)), np.int64)
    scores, states = np.empty((max_rows, _TILE_KEYS), np.float32), np.empty((max_rows, 2), np.float32)
    panel = np.empty(head_bytes // 4 * _TILE_KEYS, np.float32)
    room = np.empty(1 if form[0] == FLOAT32 else panel.size, np.float32)
    cached_bytes = head_bytes >> min(form[0], 2)
    item, place = take(arguments, enter(arguments), len(tiles) * num_kv_heads)
    while item < len(tiles) * num_kv_heads:
        # The last tiles of a prompt see the most keys: they come first.
        tile, head = len(tiles) - 1 - item // num_kv_heads, item % num_kv_heads
        sequence, first = tiles[tile, 0], tiles[tile, 1]
        end = min(first + _TILE_TOKENS, cu_seqlens[sequence + 1])
        position = context_lens[sequence] - cu_seqlens[sequence + 1] + first
        for row in range((end - first) * group):
            token, at = first + row // group, (head * group + row % group) * head_bytes
            rows[_QUERY, row] = query + token * query_stride + at
            rows[_OUT, row] = out + token * out_stride + at
            rows[_SCORES, row] = scores[row].ctypes.data
        at = head * cached_bytes
        head_cache = keys + at, values + at, num_kv_heads * cached_bytes, block_size
        head_scales = given[23] + 4 * head * block_size, given[24] + 4 * head * block_size
        span = position, position + end - first
        num_rows, blocks = (end - first) * group, block_tables[sequence]
        cached = span, head_cache, form, head_scales, room
        _attend(kernels, rows, states, panel, num_rows, group, *cached, blocks, head_bytes, scale)
        item, place = take(arguments, place, len(tiles) * num_kv_heads)
    keep(scores)


@compiled
def _tiles(cu_seqlens: SmallInts) -> Ints:
    """(sequence, first row) of every run of query tokens."""
    num_tiles = 0
    for s in range(len(cu_seqlens) - 1):
        num_tiles += (cu_seqlens[s + 1] - cu_seqlens[s] + _TILE_TOKENS - 1) // _TILE_TOKENS
    tiles = np.empty((num_tiles, 2), np.int64)
    index = 0
    for s in range(len(cu_seqlens) - 1):
        for first in range(cu_seqlens[s], cu_seqlens[s + 1], _TILE_TOKENS):
            tiles[index, 0], tiles[index, 1] = s, first
            index += 1
    return tiles


@compiled
def attention(
    team: tuple[int, int],
    share: int,
    kernels: tuple[int, int],
    query: tuple[int, int],
    out: tuple[int, int],
    cache: tuple[int, int, int],
    heads: tuple[int, int, int],
    step: tuple[int, int, int, int, int],
    form: tuple[int, int, int, int],
    scale: float,
) -> None:
    """`share`: the compiled job; `kernels`: for panels, for rows anywhere; `query`, `out`: address, stride.

    `cache`: keys, values, slots of a block; `heads`: query heads, KV heads, bytes of one; `step`: sequences,
    block tables, blocks of a row, cu_seqlens, context_lens; `form`: kind, values of a byte, scales of
    keys and values.
    """
    factor = np.array([scale], np.float32)
    tiles = _tiles(carray(pointer(step[3]), (step[0] + 1,), np.int32))
    given = np.zeros(_NUM_GIVEN, np.int64)
    given[1], given[2], given[3] = kernels[0], kernels[1], factor.ctypes.data
    given[4], given[5], given[6], given[7] = query[0], query[1], out[0], out[1]
    given[8], given[9], given[10] = cache[0], cache[1], cache[2]
    given[11], given[12], given[13] = heads[0], heads[1], heads[2]
    given[14], given[15] = tiles.ctypes.data, len(tiles)
    given[16], given[17], given[18], given[19], given[20] = step[0], step[1], step[2], step[3], step[4]
    given[21], given[22], given[23], given[24] = form[0], form[1], form[2], form[3]
    run(team, ((share, given.ctypes.data),))
    keep(factor)
    keep(tiles)
    keep(given)
