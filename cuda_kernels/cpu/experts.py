"""Compiled SwiGLU experts over weight panels: rows to experts, gate and up, down, summed up token by token.

    rows        the tokens' choices t · A + a sorted by expert; an expert's in the order of their tokens
    pass 1      item = (up to 12 rows of an expert, 64 hidden features): h = weight · silu(gate) · up
    pass 2      item = (a run of tokens, 64 outputs): y = Σ of the experts' h · down, by rising expert id

A token's sum runs over its own experts only, in one order: it has the same bits in every batch.
Shapes: T tokens, A activated experts per token, R = T · A rows, E experts.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from cuda_kernels.cpu.arrays import Bytes, Floats, Ints, SmallInts
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.elementwise import clear_row, copy_row, swiglu_row
from cuda_kernels.cpu.kernels import multiply
from cuda_kernels.cpu.linear import CHUNK, PANEL_BYTES
from cuda_kernels.cpu.panels import PANEL
from cuda_kernels.cpu.quantized import GROUP_BYTES, quantize_group, quantize_rows
from cuda_kernels.cpu.team import enter, run, take
from cuda_kernels.cpu.vector import keep, pointer

# Columns of the experts' table: the addresses of a projection's panels, and beside it of its column scales.
_GATE, _UP, _DOWN = 0, 2, 4

# What a job is given: its counter, kernel, sizes; x or y, h, table and length, bytes of a row of h; experts a
# token, rows, pieces or tokens of a run; tokens, bytes of a row of x; pieces or starts, choices, weights,
# slots; bytes of 64 hidden features in h, which may be quantized.
_NUM_GIVEN = 20

Kept = tuple[Floats, Bytes, Bytes, Floats, Ints, Ints, Ints]
Sizes = tuple[int, int, int]  # values of x, bytes from a panel to the next, panels


@compiled
def _sort_rows(expert_ids: SmallInts, num_experts: int) -> tuple[Ints, Ints]:
    """(starts [E + 1], choices [R]): expert e has the choices starts[e] .. starts[e + 1]."""
    starts = np.zeros(num_experts + 2, np.int64)
    for expert in expert_ids:
        starts[expert + 2] += 1
    for expert in range(num_experts):
        starts[expert + 2] += starts[expert + 1]
    choices = np.empty(len(expert_ids), np.int64)
    for choice, expert in enumerate(expert_ids):
        choices[starts[expert + 1]] = choice
        starts[expert + 1] += 1
    return starts[: num_experts + 1], choices


@compiled
def _pieces(starts: Ints) -> Ints:
    """(expert, first row, end) of every run of up to CHUNK rows of an expert."""
    pieces = np.empty(((starts[-1] + CHUNK - 1) // CHUNK + len(starts), 3), np.int64)
    index = 0
    for expert in range(len(starts) - 1):
        for first in range(starts[expert], starts[expert + 1], CHUNK):
            end = min(first + CHUNK, starts[expert + 1])
            pieces[index, 0], pieces[index, 1], pieces[index, 2] = expert, first, end
            index += 1
    return pieces[:index]


@compiled
def _panel(addresses: Ints, projection: int, panel: int, stride: int) -> tuple[int, int]:
    """Where one panel and its column scales are; 0 for no scales."""
    scale = addresses[projection + 1]
    return addresses[projection] + panel * stride, scale + panel * PANEL_BYTES if scale else 0


def up_gate_job(arguments: int) -> None:
    """Pass 1: take items until there is none left."""
    given = carray(pointer(arguments), (_NUM_GIVEN,), np.int64)
    kernel, num_k, stride, num_panels = given[1], given[2], given[3], given[4]
    num_activated, num_rows, num_pieces = given[10], given[11], given[12]
    x, x_bytes, h, h_bytes, h_part = given[5], given[14], given[6], given[9], given[19]
    table = carray(pointer(given[7]), (given[8], 6), np.int64)
    pieces = carray(pointer(given[15]), (num_pieces, 3), np.int64)
    choices = carray(pointer(given[16]), (num_rows,), np.int64)
    weights = carray(pointer(given[17]), (num_rows,), np.float32)
    slots = carray(pointer(given[18]), (PANEL,), np.int64)
    gate, up = np.empty((CHUNK, PANEL), np.float32), np.empty((CHUNK, PANEL), np.float32)
    rows, hidden = np.empty((3, CHUNK), np.int64), np.empty(PANEL, np.float32)
    for row in range(CHUNK):
        rows[1, row], rows[2, row] = gate[row].ctypes.data, up[row].ctypes.data
    item, place = take(arguments, enter(arguments), num_pieces * num_panels)
    while item < num_pieces * num_panels:
        piece, panel = pieces[item // num_panels], item % num_panels
        expert, first, end = piece[0], piece[1], piece[2]
        for row in range(first, end):
            rows[0, row - first] = x + choices[row] // num_activated * x_bytes
        for target, projection in ((1, _GATE), (2, _UP)):
            panels, scale = _panel(table[expert], projection, panel, stride)
            source, sums = rows[0].ctypes.data, rows[target].ctypes.data
            multiply(kernel, source, sums, end - first, panels, scale, num_k, 0)
        for row in range(first, end):
            gated, weight = rows[1, row - first], weights[choices[row] :].ctypes.data
            swiglu_row(gated, rows[2, row - first], weight, gated, PANEL)
            for feature in range(PANEL):
                hidden[feature] = gate[row - first, slots[feature]]
            target = h + row * h_bytes + panel * h_part
            if h_part == GROUP_BYTES:
                quantize_group(hidden.ctypes.data, target)
            else:
                copy_row(hidden.ctypes.data, target, PANEL)
        item, place = take(arguments, place, num_pieces * num_panels)
    keep(rows)
    keep(hidden)
    keep(gate)
    keep(up)


@compiled
def _first_row(choices: Ints, low: int, high: int, choice: int) -> int:
    """The first of rows low .. high whose choice is not below this one."""
    while low < high:
        middle = (low + high) // 2
        if choices[middle] < choice:
            low = middle + 1
        else:
            high = middle
    return low


def down_job(arguments: int) -> None:
    """Pass 2: take items until there is none left."""
    given = carray(pointer(arguments), (_NUM_GIVEN,), np.int64)
    kernel, num_k, stride, num_panels = given[1], given[2], given[3], given[4]
    num_activated, num_rows, run_length = given[10], given[11], given[12]
    h, h_bytes = given[6], given[9]
    table = carray(pointer(given[7]), (given[8], 6), np.int64)
    y = carray(pointer(given[5]), (given[13], num_panels * PANEL), np.float32)
    starts = carray(pointer(given[15]), (given[8] + 1,), np.int64)
    choices = carray(pointer(given[16]), (num_rows,), np.int64)
    rows = np.empty((2, run_length), np.int64)
    num_runs = (len(y) + run_length - 1) // run_length
    num_items = num_runs * num_panels
    item, place = take(arguments, enter(arguments), num_items)
    while item < num_items:
        panel, token = item // num_runs, item % num_runs * run_length
        end = min(token + run_length, len(y))
        for t in range(token, end):
            clear_row(y[t, panel * PANEL :].ctypes.data, PANEL)
        for expert in range(len(table)):
            first = _first_row(choices, starts[expert], starts[expert + 1], token * num_activated)
            last = _first_row(choices, first, starts[expert + 1], end * num_activated)
            for row in range(first, last):
                rows[0, row - first] = h + row * h_bytes
                rows[1, row - first] = y[choices[row] // num_activated, panel * PANEL :].ctypes.data
            panels, scale = _panel(table[expert], _DOWN, panel, stride)
            multiply(kernel, rows[0].ctypes.data, rows[1].ctypes.data, last - first, panels, scale, num_k, 1)
        item, place = take(arguments, place, num_items)


@compiled
def _reorder(x: Floats, order: Ints) -> Floats:
    """Columns of x in the order of the weight's K, zeros past its width."""
    out = np.zeros((len(x), len(order)), np.float32)
    for row in range(len(x)):
        for slot in range(len(order)):
            if order[slot] < x.shape[1]:
                out[row, slot] = x[row, order[slot]]
    return out


@compiled
def _choices(ids: int, weights: int, num_tokens: int, num_activated: int) -> tuple[SmallInts, Floats]:
    """Flat ids and weights; those of the one network where none are given."""
    if ids:
        size = num_tokens * num_activated
        return carray(pointer(ids), (size,), np.int32), carray(pointer(weights), (size,), np.float32)
    return np.zeros(num_tokens, np.int32), np.ones(num_tokens, np.float32)


@compiled
def prepare(
    kernels: tuple[int, int],
    quantizes: tuple[bool, bool],
    tables: tuple[int, int, int, int, int],
    up_gate: Sizes,
    down: Sizes,
    x: tuple[int, int, int],
    routing: tuple[int, int, int],
    y: int,
) -> tuple[Ints, Ints, Kept]:
    """What the two jobs take for y = Σ weight · expert(x), and what must be kept until they are done.

    `tables`: the experts' table, its length, the order of the inputs, its length (0: as they are), the slots;
    `x`: address, tokens, width; `routing`: ids, weights, experts a token.
    """
    inputs = carray(pointer(x[0]), (x[1], x[2]), np.float32)
    if tables[3]:
        inputs = _reorder(inputs, carray(pointer(tables[2]), (tables[3],), np.int64))
    source, x_bytes = inputs.ctypes.data, 4 * inputs.shape[1]
    levels = quantize_rows(source, x_bytes, x[1] if quantizes[0] else 0, up_gate[0])
    if quantizes[0]:
        source, x_bytes = levels.ctypes.data, levels.shape[1]
    num_activated, h_part = routing[2], GROUP_BYTES if quantizes[1] else PANEL_BYTES
    ids, weights = _choices(routing[0], routing[1], x[1], num_activated)
    starts, choices = _sort_rows(ids, tables[1])
    pieces = _pieces(starts)
    h, given = np.empty((len(choices), up_gate[2] * h_part), np.uint8), np.zeros(_NUM_GIVEN, np.int64)
    given[1], given[2], given[3], given[4] = kernels[0], up_gate[0], up_gate[1], up_gate[2]
    given[5], given[6], given[7], given[8] = source, h.ctypes.data, tables[0], tables[1]
    given[9], given[10], given[11], given[12] = h.shape[1], num_activated, len(choices), len(pieces)
    given[13], given[14], given[15], given[19] = x[1], x_bytes, pieces.ctypes.data, h_part
    given[16], given[17], given[18] = choices.ctypes.data, weights.ctypes.data, tables[4]
    second = given.copy()
    second[1], second[2], second[3], second[4] = kernels[1], down[0], down[1], down[2]
    # As many tokens as give an expert CHUNK rows, if all experts are liked alike.
    second[5], second[12], second[15] = y, CHUNK * max(1, tables[1] // num_activated), starts.ctypes.data
    return given, second, (inputs, levels, h, weights, choices, pieces, starts)


@compiled
def experts(
    team: tuple[int, int],
    shares: tuple[int, int],
    kernels: tuple[int, int],
    quantizes: tuple[bool, bool],
    tables: tuple[int, int, int, int, int],
    up_gate: Sizes,
    down: Sizes,
    x: tuple[int, int, int],
    routing: tuple[int, int, int],
    y: int,
) -> None:
    """y = Σ weight · expert(x) by the two compiled jobs `shares`; see `prepare`."""
    first, second, kept = prepare(kernels, quantizes, tables, up_gate, down, x, routing, y)
    run(team, ((shares[0], first.ctypes.data),))
    run(team, ((shares[1], second.ctypes.data),))
    keep(first)
    keep(second)
    keep(kept)
