"""Compiled SwiGLU experts over weight panels: rows to experts, gate and up, down, summed up token by token.

    rows        the tokens' choices t · A + a sorted by expert; an expert's in the order of their tokens
    pass 1      item = (up to 12 rows of an expert, 64 hidden features): h = weight · silu(gate) · up
    pass 2      item = (a run of tokens, 64 outputs): y = Σ of the experts' h · down, by rising expert id

A token's sum runs over its own experts only, in one order: it has the same bits in every batch.
Shapes: T tokens, A activated experts per token, R = T · A rows, E experts.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange
from numba.np.numpy_support import carray

from cuda_kernels.cpu.arrays import Floats, Ints, SmallInts
from cuda_kernels.cpu.elementwise import clear_row, swiglu_row
from cuda_kernels.cpu.kernels import multiply
from cuda_kernels.cpu.linear import CHUNK, PANEL_BYTES, take
from cuda_kernels.cpu.panels import PANEL
from cuda_kernels.cpu.vector import pointer

# Columns of the experts' table: the addresses of a projection's panels, and beside it of its column scales.
_GATE, _UP, _DOWN = 0, 2, 4

Sizes = tuple[int, int, int]  # values of x, bytes of a panel, panels


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def _panel(addresses: Ints, projection: int, panel: int, panel_bytes: int) -> tuple[int, int]:
    """Where one panel and its column scales are; 0 for no scales."""
    scale = addresses[projection + 1]
    return addresses[projection] + panel * panel_bytes, scale + panel * PANEL_BYTES if scale else 0


@numba.njit(nogil=True, cache=True)
def _up_gate_share(
    counter: int,
    kernel: int,
    table: Ints,
    sizes: Sizes,
    inputs: Floats,
    pieces: Ints,
    choices: Ints,
    num_activated: int,
    weights: Floats,
    slots: Ints,
    h: Floats,
) -> None:
    """Pass 1. `slots` is the order of 64 features that `down` expects."""
    num_k, panel_bytes, num_panels = sizes
    gate, up = np.empty((CHUNK, PANEL), np.float32), np.empty((CHUNK, PANEL), np.float32)
    rows = np.empty((3, CHUNK), np.int64)
    for row in range(CHUNK):
        rows[1, row], rows[2, row] = gate[row].ctypes.data, up[row].ctypes.data
    item = take(counter)
    while item < len(pieces) * num_panels:
        piece, panel = pieces[item // num_panels], item % num_panels
        expert, first, end = piece[0], piece[1], piece[2]
        for row in range(first, end):
            rows[0, row - first] = inputs[choices[row] // num_activated].ctypes.data
        for target, projection in ((1, _GATE), (2, _UP)):
            panels, scale = _panel(table[expert], projection, panel, panel_bytes)
            x, y = rows[0].ctypes.data, rows[target].ctypes.data
            multiply(kernel, x, y, end - first, panels, scale, num_k, 0)
        for row in range(first, end):
            gated, weight = rows[1, row - first], weights[choices[row] :].ctypes.data
            swiglu_row(gated, rows[2, row - first], weight, gated, PANEL)
            for feature in range(PANEL):
                h[row, panel * PANEL + feature] = gate[row - first, slots[feature]]
        item = take(counter)


@numba.njit(nogil=True, cache=True)
def _first_row(choices: Ints, low: int, high: int, choice: int) -> int:
    """The first of rows low .. high whose choice is not below this one."""
    while low < high:
        middle = (low + high) // 2
        if choices[middle] < choice:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)
def _down_share(
    counter: int,
    kernel: int,
    table: Ints,
    sizes: Sizes,
    run: int,
    starts: Ints,
    choices: Ints,
    num_activated: int,
    h: Floats,
    y: Floats,
) -> None:
    """Pass 2 over runs of `run` tokens."""
    num_k, panel_bytes, num_panels = sizes
    rows = np.empty((2, run), np.int64)
    num_runs = (len(y) + run - 1) // run
    item = take(counter)
    while item < num_runs * num_panels:
        panel, token = item // num_runs, item % num_runs * run
        end = min(token + run, len(y))
        for t in range(token, end):
            clear_row(y[t, panel * PANEL :].ctypes.data, PANEL)
        for expert in range(len(table)):
            first = _first_row(choices, starts[expert], starts[expert + 1], token * num_activated)
            last = _first_row(choices, first, starts[expert + 1], end * num_activated)
            for row in range(first, last):
                rows[0, row - first] = h[row].ctypes.data
                rows[1, row - first] = y[choices[row] // num_activated, panel * PANEL :].ctypes.data
            panels, scale = _panel(table[expert], _DOWN, panel, panel_bytes)
            multiply(kernel, rows[0].ctypes.data, rows[1].ctypes.data, last - first, panels, scale, num_k, 1)
        item = take(counter)


@numba.njit(nogil=True, cache=True)
def _reorder(x: Floats, order: Ints) -> Floats:
    """Columns of x in the order of the weight's K, zeros past its width."""
    out = np.zeros((len(x), len(order)), np.float32)
    for row in range(len(x)):
        for slot in range(len(order)):
            if order[slot] < x.shape[1]:
                out[row, slot] = x[row, order[slot]]
    return out


@numba.njit(nogil=True, cache=True)
def _choices(ids: int, weights: int, num_tokens: int, num_activated: int) -> tuple[SmallInts, Floats]:
    """Flat ids and weights; those of the one network where none are given."""
    if ids:
        size = num_tokens * num_activated
        return carray(pointer(ids), (size,), np.int32), carray(pointer(weights), (size,), np.float32)
    return np.zeros(num_tokens, np.int32), np.ones(num_tokens, np.float32)


@numba.njit(nogil=True, parallel=True, cache=True)
def experts(
    num_threads: int,
    kernels: tuple[int, int],
    tables: tuple[int, int, int, int, int],
    up_gate: Sizes,
    down: Sizes,
    x: tuple[int, int, int],
    routing: tuple[int, int, int],
    y: int,
) -> None:
    """y = Σ weight · expert(x).

    `tables`: the experts' table, its length, the order of the inputs, its length (0: as they are), the slots;
    `x`: address, tokens, width; `routing`: ids, weights, experts a token.
    """
    table = carray(pointer(tables[0]), (tables[1], 6), np.int64)
    slots = carray(pointer(tables[4]), (PANEL,), np.int64)
    inputs = carray(pointer(x[0]), (x[1], x[2]), np.float32)
    outputs = carray(pointer(y), (x[1], down[2] * PANEL), np.float32)
    if tables[3]:
        inputs = _reorder(inputs, carray(pointer(tables[2]), (tables[3],), np.int64))
    num_activated = routing[2]
    ids, weights = _choices(routing[0], routing[1], x[1], num_activated)
    starts, choices = _sort_rows(ids, tables[1])
    pieces = _pieces(starts)
    h = np.empty((len(choices), up_gate[2] * PANEL), np.float32)
    counters = np.zeros(2, np.int64)
    first, second = counters.ctypes.data, counters.ctypes.data + 8
    # As many tokens as give an expert CHUNK rows, if all experts are liked alike.
    run = CHUNK * max(1, tables[1] // num_activated)
    for _ in prange(num_threads):
        _up_gate_share(
            first, kernels[0], table, up_gate, inputs, pieces, choices, num_activated, weights, slots, h
        )
    for _ in prange(num_threads):
        _down_share(second, kernels[1], table, down, run, starts, choices, num_activated, h, outputs)
