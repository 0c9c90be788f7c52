"""The multiplying kernel: some rows of x times one panel of 64 weight columns, decoded in registers.

A panel's columns lie side by side, so that a vector holds 16 columns of one weight row k:

    acc[row, column] = fma(x[row, k], weight[k, column], acc[row, column])        k = 0, 1, 2, …

One chain of fused multiply-adds for each result, in the order of k, whatever the number of rows: a row has
the same bits in every batch. Rows are taken up to six at a time (6 × 4 accumulators of the 32 vector
registers), and a weight is decoded once for all of them. `panels.py` draws the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.panels import CODE_ROWS, PANEL
from cuda_kernels.cpu.vector import F32, I8, I16, I32, I64, LANES, VF32, VI32, Builder, Value
from cuda_kernels.formats.layout import GROUP_SIZE

_VECTORS = PANEL // LANES
_TILE_ROWS = (6, 4, 3, 2, 1)
# 2^23 in float32: an integer below 2^23 in its mantissa is that integer more.
_MAGIC, _MAGIC_BITS = 8388608.0, 0x4B000000

# Calls use(k, weights) with the four vectors of weight row k, for every k of a panel.
Use = Callable[[Value, list[Value]], None]
Decode = Callable[[Builder, Value, Value, Use], None]


def panel_product(decode: Decode, num_columns: int = PANEL) -> Any:
    """The kernel of a format: f(x_rows, y_rows, num_rows, panel, scale, num_k, adds).

    `x_rows` and `y_rows` point to the rows' addresses, `scale` to a float for each column or is 0; y is scale
    times the sums, plus what y held if `adds` is not 0.
    """

    def emit(builder: Builder, x_rows: Value, y_rows: Value, num_rows: Value, *panel: Value) -> None:
        done = ir.Constant(I64, 0)
        for size in _TILE_ROWS:
            count = builder.sdiv(builder.sub(num_rows, done), ir.Constant(I64, size))
            with cgutils.for_range(builder, count) as loop:
                first = builder.add(done, v.scaled(builder, loop.index, size))
                x, y = (builder.add(rows, v.scaled(builder, first, 8)) for rows in (x_rows, y_rows))
                _tile(builder, decode, num_columns // LANES, size, x, y, *panel)
            done = builder.add(done, v.scaled(builder, count, size))

    return v.kernel(emit, 7)


def _tile(
    builder: Builder,
    decode: Decode,
    num_vectors: int,
    num_rows: int,
    x_rows: Value,
    y_rows: Value,
    panel: Value,
    scale: Value,
    num_k: Value,
    adds: Value,
) -> None:
    rows = [v.load(builder, v.offset(builder, x_rows, 8 * row), I64) for row in range(num_rows)]
    sums = [[_zero(builder) for _ in range(num_vectors)] for _ in rows]

    def use(k: Value, weights: list[Value]) -> None:
        for address, accumulators in zip(rows, sums, strict=True):
            x = v.splat(builder, v.load(builder, builder.add(address, v.scaled(builder, k, 4)), F32))
            for weight, accumulator in zip(weights, accumulators, strict=True):
                builder.store(v.fma(builder, x, weight, builder.load(accumulator)), accumulator)

    decode(builder, panel, num_k, use)
    for row, accumulators in enumerate(sums):
        y = v.load(builder, v.offset(builder, y_rows, 8 * row), I64)
        _write(builder, accumulators, y, scale, adds)


def _zero(builder: Builder) -> Value:
    slot = cgutils.alloca_once(builder, VF32)
    builder.store(v.constant(0.0), slot)
    return slot


def _write(builder: Builder, accumulators: list[Value], y: Value, scale: Value, adds: Value) -> None:
    zero = ir.Constant(I64, 0)
    for index, accumulator in enumerate(accumulators):
        at = 4 * LANES * index
        with builder.if_then(builder.icmp_signed("!=", scale, zero)):
            factor = v.load(builder, v.offset(builder, scale, at))
            builder.store(builder.fmul(builder.load(accumulator), factor), accumulator)
        with builder.if_then(builder.icmp_signed("!=", adds, zero)):
            old = v.load(builder, v.offset(builder, y, at))
            builder.store(builder.fadd(builder.load(accumulator), old), accumulator)
        v.store(builder, builder.load(accumulator), v.offset(builder, y, at))


def decode_scattered(builder: Builder, rows: Value, num_k: Value, use: Use) -> None:
    """float32 rows wherever they lie: `rows` points to their addresses."""
    with cgutils.for_range(builder, num_k) as loop:
        row = v.load(builder, builder.add(rows, v.scaled(builder, loop.index, 8)), I64)
        use(loop.index, [v.load(builder, at) for at in _vectors(builder, row, 4)])


def decode_narrow(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    """float32 rows of one vector."""
    with cgutils.for_range(builder, num_k) as loop:
        use(loop.index, [v.load(builder, builder.add(panel, v.scaled(builder, loop.index, 4 * LANES)))])


def decode_float32(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    _rows(builder, panel, num_k, use, 4, lambda at: v.load(builder, at))


def decode_bfloat16(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    def widen(at: Value) -> Value:
        bits = builder.zext(v.load(builder, at, v.vector(I16)), VI32)
        return builder.bitcast(builder.shl(bits, v.integer(16)), VF32)

    _rows(builder, panel, num_k, use, 2, widen)


def _rows(
    builder: Builder, panel: Value, num_k: Value, use: Use, size: int, widen: Callable[[Value], Value]
) -> None:
    """One element of `size` bytes a weight, row after row."""
    with cgutils.for_range(builder, num_k) as loop:
        row = builder.add(panel, v.scaled(builder, loop.index, PANEL * size))
        use(loop.index, [widen(at) for at in _vectors(builder, row, size)])


def _vectors(builder: Builder, row: Value, size: int) -> Iterator[Value]:
    for index in range(_VECTORS):
        yield v.offset(builder, row, index * LANES * size)


def decode_wint8(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    _levels(builder, panel, num_k, use, 8, range(0, 32, 8))


def decode_wint4(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    _levels(builder, panel, num_k, use, 4, (*range(0, 32, 8), *range(4, 32, 8)))


def _levels(builder: Builder, panel: Value, num_k: Value, use: Use, bits: int, shifts: Sequence[int]) -> None:
    """Unsigned integers side by side in 32 bits, one after another along k."""
    mask, zero = v.integer(2**bits - 1), v.constant(_MAGIC + 2 ** (bits - 1))
    with cgutils.for_range(builder, builder.udiv(num_k, ir.Constant(I64, len(shifts)))) as loop:
        row = builder.add(panel, v.scaled(builder, loop.index, 4 * PANEL))
        words = [v.load(builder, at, VI32) for at in _vectors(builder, row, 4)]
        first = v.scaled(builder, loop.index, len(shifts))
        for step, shift in enumerate(shifts):
            small = [builder.and_(builder.lshr(word, v.integer(shift)), mask) for word in words]
            weights = [builder.fsub(_plus_magic(builder, level), zero) for level in small]
            use(v.offset(builder, first, step), weights)


def _plus_magic(builder: Builder, small: Value) -> Value:
    return builder.bitcast(builder.or_(small, v.integer(_MAGIC_BITS)), VF32)


def _bytes(builder: Builder, at: Value) -> Value:
    return builder.zext(v.load(builder, at, v.vector(I8)), VI32)


_HEAD = 2 * 4 * PANEL
_PAIR = PANEL + 2 * CODE_ROWS * PANEL


def decode_wint2(builder: Builder, panel: Value, num_k: Value, use: Use) -> None:
    """code = floor(fma(byte, code_scale, code_zp + 0.5)); (its fields - 32) · the group's local scale."""
    with cgutils.for_range(builder, builder.udiv(num_k, ir.Constant(I64, GROUP_SIZE))) as groups:
        local, codes = find_group(builder, panel, groups.index)
        with cgutils.for_range(builder, ir.Constant(I64, CODE_ROWS)) as rows:
            row = builder.add(codes, v.scaled(builder, rows.index, PANEL))
            codes_at = zip(_vectors(builder, row, 1), code_parameters(builder, panel), strict=True)
            points = [_code(builder, at, parameters) for at, parameters in codes_at]
            first = builder.add(v.scaled(builder, groups.index, GROUP_SIZE), v.scaled(builder, rows.index, 4))
            for field, shift in enumerate((9, 6, 3, 0)):
                levels = zip(points, local, strict=True)
                weights = [_weight2(builder, code, shift, scale) for code, scale in levels]
                use(v.offset(builder, first, field), weights)


def find_group(builder: Builder, panel: Value, group: Value) -> tuple[list[Value], Value]:
    """Its columns' local scales, and where its codes are."""
    pair = builder.add(panel, v.scaled(builder, builder.lshr(group, ir.Constant(I64, 1)), _PAIR))
    pair = v.offset(builder, pair, _HEAD)
    odd = builder.and_(group, ir.Constant(I64, 1))
    local = [_local_scale(builder, at, odd) for at in _vectors(builder, pair, 1)]
    return local, builder.add(v.offset(builder, pair, PANEL), v.scaled(builder, odd, CODE_ROWS * PANEL))


def _local_scale(builder: Builder, at: Value, odd: Value) -> Value:
    """The even group's nibble is the high one."""
    shift = builder.sub(ir.Constant(I32, 4), builder.shl(builder.trunc(odd, I32), ir.Constant(I32, 2)))
    nibble = builder.and_(builder.lshr(_bytes(builder, at), v.splat(builder, shift)), v.integer(15))
    return builder.sitofp(nibble, VF32)


def code_parameters(builder: Builder, panel: Value) -> list[tuple[Value, Value]]:
    """code_scale and code_zp + 0.5 of 16 columns, four times."""
    pairs = zip(
        _vectors(builder, panel, 4), _vectors(builder, v.offset(builder, panel, 4 * PANEL), 4), strict=True
    )
    return [(v.load(builder, scale), v.load(builder, zero)) for scale, zero in pairs]


def point_of(builder: Builder, at: Value, parameters: tuple[Value, Value]) -> Value:
    """byte · code_scale + code_zp + 0.5 of the 16 columns there: its floor is the code."""
    return v.fma(builder, builder.uitofp(_bytes(builder, at), VF32), *parameters)


def _code(builder: Builder, at: Value, parameters: tuple[Value, Value]) -> Value:
    return builder.fptosi(v.call(builder, "floor", point_of(builder, at, parameters)), VI32)


def _weight2(builder: Builder, code: Value, shift: int, local: Value) -> Value:
    field = builder.and_(builder.lshr(code, v.integer(shift)) if shift else code, v.integer(63))
    # (2^23 + field) · local - (2^23 + 32) · local, every term exact.
    zero = builder.fmul(local, v.constant(-(_MAGIC + 32)))
    return v.fma(builder, _plus_magic(builder, field), local, zero)
