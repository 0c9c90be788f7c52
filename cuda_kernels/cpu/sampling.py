"""Compiled drawing of tokens and what goes with it, a row at a time: the same bits in every batch.

Arguments are addresses, sizes, and strides in bytes. A row's scratch room is a whole number of vectors:

    width                     -inf, later 0
    logits, later weights ……… | ………        then RESULTS: what a pass over the row leaves
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.np.numpy_support import carray

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.arrays import Floats, Ints
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.elementwise import copy_row, exp
from cuda_kernels.cpu.vector import I32, LANES, VI32, Builder, Value, keep, pointer

_RUN = 128  # tokens whose mass is summed at once when one of them is looked for
_RESULTS = 64  # floats: what the passes over a row are given and leave
_ONE = 0x3F800000  # 1.0 as bits; those of floats that are not negative order as the floats do


def _slot(builder: Builder, start: Value) -> Value:
    slot = cgutils.alloca_once(builder, start.type)
    builder.store(start, slot)
    return slot


def _add_to(builder: Builder, slot: Value, value: Value) -> None:
    add = builder.add if value.type == VI32 else builder.fadd
    builder.store(add(builder.load(slot), value), slot)


def _survey(builder: Builder, row: Value, width: Value, out: Value) -> None:
    """By lane: its largest value, the byte where its vector begins, and a NaN if it has one, else 0."""
    peak, place, poison = (
        _slot(builder, start) for start in (v.constant(float("-inf")), v.integer(0), v.constant(0.0))
    )
    with v.vectors(builder, width) as at:
        value = v.load(builder, builder.add(row, at))
        is_larger = builder.fcmp_ordered(">", value, builder.load(peak))
        here = v.splat(builder, builder.trunc(at, I32))
        builder.store(builder.select(is_larger, value, builder.load(peak)), peak)
        builder.store(builder.select(is_larger, here, builder.load(place)), place)
        is_nan = builder.fcmp_unordered("uno", value, value)
        _add_to(builder, poison, builder.select(is_nan, value, v.constant(0.0)))
    for index, slot in enumerate((peak, place, poison)):
        v.store(builder, builder.load(slot), v.offset(builder, out, 4 * LANES * index))


def _weigh(builder: Builder, row: Value, width: Value, state: Value) -> None:
    """row = e^((row - peak) · factor) in place; `state` points to peak and factor, the sum follows."""
    peak = v.splat(builder, v.load(builder, state, v.F32))
    factor = v.splat(builder, v.load(builder, v.offset(builder, state, 4), v.F32))
    total = _slot(builder, v.constant(0.0))
    with v.vectors(builder, width) as at:
        target = builder.add(row, at)
        weight = exp(builder, builder.fmul(builder.fsub(v.load(builder, target), peak), factor))
        v.store(builder, weight, target)
        _add_to(builder, total, weight)
    _leave(builder, v.fold(builder, builder.load(total), builder.fadd), v.offset(builder, state, 8))


def _tally(builder: Builder, row: Value, width: Value, state: Value) -> None:
    """What is not below the threshold that `state` points to: its sum and its number follow there."""
    threshold = v.splat(builder, v.load(builder, state, v.F32))
    mass, count = _slot(builder, v.constant(0.0)), _slot(builder, v.integer(0))
    with v.vectors(builder, width) as at:
        value = v.load(builder, builder.add(row, at))
        is_kept = builder.fcmp_ordered(">=", value, threshold)
        _add_to(builder, mass, builder.select(is_kept, value, v.constant(0.0)))
        _add_to(builder, count, builder.zext(is_kept, VI32))
    _leave(builder, v.fold(builder, builder.load(mass), builder.fadd), v.offset(builder, state, 4))
    _leave(builder, v.fold(builder, builder.load(count), builder.add), v.offset(builder, state, 8))


def _leave(builder: Builder, lanes: Value, address: Value) -> None:
    v.store(builder, builder.extract_element(lanes, ir.Constant(I32, 0)), address)


def _penalise(builder: Builder, row: Value, divisor: Value, loss: Value, width: Value) -> None:
    """row / divisor where positive, row · divisor elsewhere, less the loss; in place."""
    with v.vectors(builder, width) as at:
        target = builder.add(row, at)
        value, by = v.load(builder, target), v.load(builder, builder.add(divisor, at))
        is_positive = builder.fcmp_ordered(">", value, v.constant(0.0))
        scaled = builder.select(is_positive, builder.fdiv(value, by), builder.fmul(value, by))
        v.store(builder, builder.fsub(scaled, v.load(builder, builder.add(loss, at))), target)


_survey_row = v.kernel(_survey, 3)
_weigh_row = v.kernel(_weigh, 3)
_tally_row = v.kernel(_tally, 3)
_penalise_row = v.kernel(_penalise, 4)


@compiled
def _find_peak(row: int, width: int, results: Floats) -> int:
    """The first of the largest values' places; leaves the value in results[0], a NaN if the row has one."""
    _survey_row(row, width, results.ctypes.data)
    places = results.view(np.int32)
    peak, best, poison = np.float32(-np.inf), 0, np.float32(0)
    for lane in range(LANES):
        place = places[LANES + lane] // 4 + lane
        if results[lane] > peak or (results[lane] == peak and place < best):
            peak, best = results[lane], place
        poison += results[2 * LANES + lane]
    results[0] = peak + poison
    return best


@compiled
def _find_threshold(
    row: int, width: int, wanted_mass: np.float32, wanted_count: int, results: Floats
) -> np.float32:
    """The largest value at which what is not below it has that mass and that number, one of which is 0.

    Halves the range of bits until one value at most is left in it.
    """
    bits = results.view(np.int32)
    low, high, num_above_high = 0, _ONE + 1, 0
    num_low = width + 1
    while high - low > 1 and num_low - num_above_high > 1:
        middle = (low + high) // 2
        bits[0] = middle
        _tally_row(row, width, results.ctypes.data)
        if results[1] >= wanted_mass and bits[2] >= wanted_count:
            low, num_low = middle, bits[2]
        else:
            high, num_above_high = middle, bits[2]
    bits[0] = low
    threshold: np.float32 = results[0]
    return threshold


@compiled
def _cut(
    row: int, width: int, total: np.float32, top_k: int, top_p: np.float32, min_p: np.float32, results: Floats
) -> np.float32:
    """The smallest weight that top_k, then top_p, then min_p keep; the peak's weight is 1."""
    threshold = np.float32(0)
    if 0 < top_k < width:
        threshold = _find_threshold(row, width, np.float32(0), top_k, results)
        results[0] = threshold
        _tally_row(row, width, results.ctypes.data)
        total = results[1]
    if top_p < 1:
        threshold = max(threshold, _find_threshold(row, width, top_p * total, 0, results))
    return max(threshold, min_p)


@compiled
def _locate(row: int, width: int, threshold: np.float32, uniform: float, results: Floats) -> int:
    """The first place where the mass of what is not below the threshold exceeds the uniform share of all."""
    masses = np.empty((width + _RUN - 1) // _RUN)
    results[0] = threshold
    for run in range(len(masses)):
        start = run * _RUN
        _tally_row(row + 4 * start, min(_RUN, width - start), results.ctypes.data)
        masses[run] = results[1]
    target, before, run = uniform * masses.sum(), 0.0, 0
    while run < len(masses) - 1 and before + masses[run] <= target:
        before += masses[run]
        run += 1
    weights, found = carray(pointer(row), (width,), np.float32), 0
    for place in range(run * _RUN, min(width, (run + 1) * _RUN)):
        if weights[place] >= threshold and weights[place] > 0:
            before, found = before + weights[place], place
            if before > target:
                break
    return found


@compiled
def _draw_row(
    row: int,
    width: int,
    temperature: np.float32,
    top_k: int,
    top_p: np.float32,
    min_p: np.float32,
    uniform: float,
    results: Floats,
) -> int:
    """Leaves the row's weights in its place, and its peak in results[3]."""
    best = _find_peak(row, width, results)
    peak = results[3] = results[0]
    if temperature == 0 or not np.isfinite(peak):
        return best
    results[1] = 1 / temperature
    _weigh_row(row, width, results.ctypes.data)
    threshold = np.float32(0)
    if top_k > 0 or top_p < 1 or min_p > 0:
        threshold = _cut(row, width, results[2], top_k, top_p, min_p, results)
    return _locate(row, width, threshold, uniform, results)


@compiled
def draw(
    logits: tuple[int, int, int, int], wishes: tuple[int, int, int, int, int], token_ids: int, peaks: int
) -> None:
    """`logits`: address, stride, rows, width; `wishes`: in the order of the op's arguments."""
    address, stride, num_rows, width = logits
    temperature_S = carray(pointer(wishes[0]), (num_rows,), np.float32)
    top_k_S = carray(pointer(wishes[1]), (num_rows,), np.int32)
    top_p_S = carray(pointer(wishes[2]), (num_rows,), np.float32)
    min_p_S = carray(pointer(wishes[3]), (num_rows,), np.float32)
    uniform_S = carray(pointer(wishes[4]), (num_rows,), np.float64)
    token_ids_S = carray(pointer(token_ids), (num_rows,), np.int64)
    peaks_S = carray(pointer(peaks), (num_rows,), np.float32)
    whole, padded = width // LANES * LANES, (width + LANES - 1) // LANES * LANES
    room, results = np.empty(padded, np.float32), np.empty(_RESULTS, np.float32)
    for s in range(num_rows):
        row = address + s * stride
        copy_row(row, room.ctypes.data, width)
        room[whole:width] = carray(pointer(row), (width,), np.float32)[whole:]
        room[width:] = -np.inf
        wish = temperature_S[s], top_k_S[s], top_p_S[s], min_p_S[s], uniform_S[s]
        token_ids_S[s] = _draw_row(room.ctypes.data, padded, *wish, results)
        peaks_S[s] = results[3]
    keep(room)
    keep(results)


@compiled
def penalise(
    logits: tuple[int, int, int], positions: int, rows: int, num: int, divisors: int, losses: int
) -> None:
    """`logits`: address, stride, width; row `positions[i]` by row `rows[i]` of divisors and losses."""
    address, stride, width = logits
    position_X = carray(pointer(positions), (num,), np.int64)
    row_X = carray(pointer(rows), (num,), np.int64)
    whole = width // LANES * LANES
    for i in range(num):
        row, at = address + position_X[i] * stride, row_X[i] * width * 4
        _penalise_row(row, divisors + at, losses + at, width)
        logits_V = carray(pointer(row), (width,), np.float32)
        divisor_V = carray(pointer(divisors + at), (width,), np.float32)
        loss_V = carray(pointer(losses + at), (width,), np.float32)
        for token in range(whole, width):
            x, by = logits_V[token], divisor_V[token]
            logits_V[token] = (x / by if x > 0 else x * by) - loss_V[token]


@compiled
def find_likeliest(values: tuple[int, int, int], count: int, best: int, ids: int) -> None:
    """`values`: address, rows, width; the `count` largest of each row in order, ties by place."""
    address, num_rows, width = values
    values_RV = carray(pointer(address), (num_rows, width), np.float32)
    best_RK = carray(pointer(best), (num_rows, count), np.float32)
    ids_RK = carray(pointer(ids), (num_rows, count), np.int64)
    for row in range(num_rows if count else 0):
        _insert_all(values_RV[row], best_RK[row], ids_RK[row])


@compiled
def _insert_all(values: Floats, best: Floats, ids: Ints) -> None:
    last, known = len(best) - 1, 0
    for place in range(len(values)):
        if known > last and not values[place] > best[last]:
            continue
        rank = min(known, last)
        while rank > 0 and values[place] > best[rank - 1]:
            best[rank], ids[rank] = best[rank - 1], ids[rank - 1]
            rank -= 1
        best[rank], ids[rank] = values[place], place
        known += 1


@compiled
def forbid(logits: tuple[int, int, int], positions: int, num: int, masks: int, num_words: int) -> None:
    """`logits`: address, stride, width; row `positions[i]` by the bits of row i of the masks."""
    address, stride, width = logits
    position_X = carray(pointer(positions), (num,), np.int64)
    masks_XW = carray(pointer(masks), (num, num_words), np.int32)
    for i in range(num):
        logits_V = carray(pointer(address + position_X[i] * stride), (width,), np.float32)
        for word in range(num_words):
            bits = masks_XW[i, word]
            if bits != -1:
                for token in range(32 * word, min(width, 32 * word + 32)):
                    if not bits >> (token % 32) & 1:
                        logits_V[token] = -np.inf
