"""Compiled row operations: RMS normalization, rotary embedding, SwiGLU, one step of a running softmax.

Each is a straight run of vector code over one row, so that a row has the same bits in every batch. Sums take
16 lanes side by side and then halve: ((0+8)+(4+12))+…
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.vector import F32, I32, I64, LANES, VF32, VI32, Builder, Value

_ROW_BYTES = 4 * LANES
_LOWEST = -87.3  # below it e^x is no normal float32, and counts as 0
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Cephes' expf: e^r = 1 + r + r²·p(r) for |r| ≤ ln 2 / 2.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(builder: Builder, x: Value) -> Value:
    """e^x to one or two units in the last place, 0 below -87.3."""
    clamped = v.call(builder, "minnum", v.call(builder, "maxnum", x, v.constant(_LOWEST)), v.constant(88.3))
    whole = v.call(builder, "rint", builder.fmul(clamped, v.constant(_LOG2E)))
    rest = v.fma(builder, whole, v.constant(-_LN2_HIGH), clamped)
    rest = v.fma(builder, whole, v.constant(-_LN2_LOW), rest)
    poly = v.constant(_EXP[0])
    for coefficient in _EXP[1:]:
        poly = v.fma(builder, poly, rest, v.constant(coefficient))
    poly = v.fma(builder, poly, builder.fmul(rest, rest), builder.fadd(rest, v.constant(1.0)))
    exponent = builder.shl(builder.add(builder.fptosi(whole, VI32), v.integer(127)), v.integer(23))
    value = builder.fmul(poly, builder.bitcast(exponent, VF32))
    # A NaN compares false both ways and must stay NaN.
    is_tiny = builder.fcmp_ordered("<", x, v.constant(_LOWEST))
    value = builder.select(is_tiny, v.constant(0.0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def _total(builder: Builder, lanes: Value) -> Value:
    """The sum of the lanes, in every lane."""
    return v.fold(builder, lanes, builder.fadd)


def _peak(builder: Builder, lanes: Value) -> Value:
    """The largest lane, in every lane."""
    return v.fold(builder, lanes, lambda a, b: v.call(builder, "maxnum", a, b))


def _accumulator(builder: Builder) -> Value:
    slot = cgutils.alloca_once(builder, VF32)
    builder.store(v.constant(0.0), slot)
    return slot


def _add(builder: Builder, x: Value, y: Value, out: Value, width: Value) -> None:
    with v.vectors(builder, width) as at:
        total = builder.fadd(v.load(builder, builder.add(x, at)), v.load(builder, builder.add(y, at)))
        v.store(builder, total, builder.add(out, at))


def _rms_norm(builder: Builder, x: Value, weight: Value, eps: Value, out: Value, width: Value) -> None:
    """out = x / sqrt(mean(x²) + eps) · weight, `eps` the address of a float."""
    squares = _accumulator(builder)
    with v.vectors(builder, width) as at:
        value = v.load(builder, builder.add(x, at))
        builder.store(v.fma(builder, value, value, builder.load(squares)), squares)
    mean = builder.fdiv(_total(builder, builder.load(squares)), v.splat(builder, builder.sitofp(width, F32)))
    epsilon = v.splat(builder, v.load(builder, eps, F32))
    factor = builder.fdiv(v.constant(1.0), v.call(builder, "sqrt", builder.fadd(mean, epsilon)))
    with v.vectors(builder, width) as at:
        normed = builder.fmul(v.load(builder, builder.add(x, at)), factor)
        v.store(builder, builder.fmul(normed, v.load(builder, builder.add(weight, at))), builder.add(out, at))


def _swiglu(builder: Builder, gate: Value, up: Value, factor: Value, out: Value, width: Value) -> None:
    """out = silu(gate) · up · factor, `factor` the address of a float."""
    weight = v.splat(builder, v.load(builder, factor, F32))
    with v.vectors(builder, width) as at:
        g = v.load(builder, builder.add(gate, at))
        denominator = builder.fadd(v.constant(1.0), exp(builder, builder.fneg(g)))
        inner = builder.fmul(builder.fdiv(g, denominator), v.load(builder, builder.add(up, at)))
        v.store(builder, builder.fmul(inner, weight), builder.add(out, at))


def _rotate(builder: Builder, row: Value, cos_sin: Value, width: Value) -> None:
    """Pairs (a, b) to (a·cos - b·sin, b·cos + a·sin), in place; cos_sin is width/2 cosines, then sines."""
    half = ir.VectorType(F32, LANES // 2)
    twice = [lane // 2 for lane in range(LANES)]
    swapped = [lane ^ 1 for lane in range(LANES)]
    signs = ir.Constant(VF32, [ir.Constant(F32, 1.0 if lane % 2 else -1.0) for lane in range(LANES)])
    sines = builder.add(cos_sin, v.scaled(builder, width, 2))
    with v.vectors(builder, width) as at:
        angle = builder.lshr(at, ir.Constant(I64, 1))
        cos = v.shuffle(builder, v.load(builder, builder.add(cos_sin, angle), half), twice)
        sin = v.shuffle(builder, v.load(builder, builder.add(sines, angle), half), twice)
        x = v.load(builder, builder.add(row, at))
        turned = builder.fmul(v.shuffle(builder, x, swapped), builder.fmul(sin, signs))
        v.store(builder, builder.fadd(builder.fmul(x, cos), turned), builder.add(row, at))


def _copy(builder: Builder, source: Value, target: Value, width: Value) -> None:
    with v.vectors(builder, width) as at:
        v.store(builder, v.load(builder, builder.add(source, at)), builder.add(target, at))


def _clear(builder: Builder, target: Value, width: Value) -> None:
    with v.vectors(builder, width) as at:
        v.store(builder, v.constant(0.0), builder.add(target, at))


def _divide(builder: Builder, row: Value, divisor: Value, width: Value) -> None:
    by = v.splat(builder, v.load(builder, divisor, F32))
    with v.vectors(builder, width) as at:
        target = builder.add(row, at)
        v.store(builder, builder.fdiv(v.load(builder, target), by), target)


def _soften(
    builder: Builder, scores: Value, num_keys: Value, scale: Value, state: Value, out: Value, width: Value
) -> None:
    """One more tile of 64 keys of a row's softmax.

    `state` is the largest score yet and the sum of weights relative to it; scores become weights relative to
    the new largest one, and `out` and the sum are brought down to it. Only the first `num_keys` keys count.
    """
    factor = v.splat(builder, v.load(builder, scale, F32))
    tiles = [_score(builder, scores, num_keys, factor, first) for first in range(0, 64, LANES)]
    old = v.splat(builder, v.load(builder, state, F32))
    peak = old
    for tile in tiles:
        peak = v.call(builder, "maxnum", peak, tile)
    peak = _peak(builder, peak)
    fading = exp(builder, builder.fsub(old, peak))
    total = v.constant(0.0)
    for index, tile in enumerate(tiles):
        weights = exp(builder, builder.fsub(tile, peak))
        v.store(builder, weights, v.offset(builder, scores, _ROW_BYTES * index))
        total = builder.fadd(total, weights)
    total_at = v.offset(builder, state, 4)
    sums = v.splat(builder, v.load(builder, total_at, F32))
    sums = v.fma(builder, sums, fading, _total(builder, total))
    v.store(builder, builder.extract_element(peak, ir.Constant(I32, 0)), state)
    v.store(builder, builder.extract_element(sums, ir.Constant(I32, 0)), total_at)
    with v.vectors(builder, width) as at:
        target = builder.add(out, at)
        v.store(builder, builder.fmul(v.load(builder, target), fading), target)


def _score(builder: Builder, scores: Value, num_keys: Value, factor: Value, first: int) -> Value:
    lanes = ir.Constant(VI32, [ir.Constant(I32, first + lane) for lane in range(LANES)])
    is_seen = builder.icmp_signed("<", lanes, v.splat(builder, builder.trunc(num_keys, I32)))
    value = builder.fmul(v.load(builder, v.offset(builder, scores, 4 * first)), factor)
    return builder.select(is_seen, value, v.constant(float("-inf")))


def _transpose(builder: Builder, rows: Value, at: Value, columns: Value) -> None:
    """16 × 16 floats, at byte `at` of the 16 rows whose addresses `rows` points to, to rows of 256 bytes."""
    block = [
        v.load(builder, builder.add(v.load(builder, v.offset(builder, rows, 8 * row), I64), at))
        for row in range(LANES)
    ]
    for distance in (8, 4, 2, 1):
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        for row in range(LANES):
            if not row & distance:
                a, b = block[row], block[row + distance]
                block[row] = v.shuffle(builder, a, low, b)
                block[row + distance] = v.shuffle(builder, a, high, b)
    for index, column in enumerate(block):
        v.store(builder, column, v.offset(builder, columns, 256 * index))


add_row = v.kernel(_add, 4)
rms_norm_row = v.kernel(_rms_norm, 5)
swiglu_row = v.kernel(_swiglu, 5)
rotate_row = v.kernel(_rotate, 3)
copy_row = v.kernel(_copy, 3)
clear_row = v.kernel(_clear, 2)
divide_row = v.kernel(_divide, 3)
soften_row = v.kernel(_soften, 6)
transpose = v.kernel(_transpose, 3)
