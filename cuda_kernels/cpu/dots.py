"""The integer kernel: rows of x in 8 bits times one panel of 64 weight columns, for CPUs that have VNNI.

A row of x is quantized in groups of 64 values (`quantized.py`). One instruction multiplies four of its bytes
with four weights of each of 16 columns:

    sum[row, column]  = Σ x[row, k] · (u[k, column] - zero)            exact, in int32; u is unsigned
    y[row, column]   += sum · (x's scale[row, group] · weight scale[group, column])        for group 0, 1, …

Many rows share what a group's weights decode to, 4 KiB; one row is multiplied with them as they are decoded.
Sums are exact and a row's groups are added in order: a row has the same bits in every batch. `panels.py`
draws the formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.panels import PANEL
from cuda_kernels.cpu.quantized import GROUP_BYTES, NEGATIVE_SUM, SCALE
from cuda_kernels.cpu.tiles import code_parameters, find_group, point_of
from cuda_kernels.cpu.vector import F32, I32, I64, LANES, VI32, Builder, Value
from cuda_kernels.formats.layout import GROUP_SIZE

_VECTORS = PANEL // LANES
_ROW_BYTES = 4 * PANEL  # of four values of k
_STEPS = GROUP_SIZE // 4
_TILE_ROWS = (4, 1)
_LINE = 64
# A CPU's own prefetching ends with each page, so the next page is asked for here.
_AHEAD = 4096


@dataclass(frozen=True, slots=True)
class Group:
    """64 values of k of a panel: float32 scales of its columns, and their weights, four of k at a time.

    `four(step)` emits the code for k = 4 · step and the next three: a vector for each 16 columns.
    """

    scales: list[Value]
    four: Callable[[int], list[Value]]


# Finds a group of the panel, given the addresses of panel and column scales and the group's number.
Find = Callable[[Builder, Value, Value, Value], Group]


def panel_dot(find: Find, zero: int, is_decoded: bool = True) -> Any:
    """The kernel of a format, as `tiles.panel_product`, but x_rows point to quantized rows.

    `is_decoded`: whether it is more work to find weights than to load them.
    """

    def emit(
        builder: Builder,
        x_rows: Value,
        y_rows: Value,
        num_rows: Value,
        panel: Value,
        scale: Value,
        num_k: Value,
        adds: Value,
    ) -> None:
        room = cgutils.alloca_once(builder, ir.ArrayType(VI32, GROUP_SIZE * PANEL // (4 * LANES)))
        room = builder.ptrtoint(room, I64)
        with builder.if_then(builder.icmp_signed("==", adds, ir.Constant(I64, 0))):
            _clear(builder, y_rows, num_rows)
        num_groups = builder.udiv(num_k, ir.Constant(I64, GROUP_SIZE))
        with builder.if_else(builder.icmp_signed("==", num_rows, ir.Constant(I64, 1))) as (one, many):
            with one, cgutils.for_range(builder, num_groups) as groups:
                x_at = v.scaled(builder, groups.index, GROUP_BYTES)
                group = find(builder, panel, scale, groups.index)
                _all_rows(builder, group, zero, x_rows, y_rows, num_rows, x_at, (1,))
            with many, cgutils.for_range(builder, num_groups) as groups:
                x_at = v.scaled(builder, groups.index, GROUP_BYTES)
                group = find(builder, panel, scale, groups.index)
                group = _decoded(builder, group, room) if is_decoded else group
                _all_rows(builder, group, zero, x_rows, y_rows, num_rows, x_at, _TILE_ROWS)

    return v.kernel(emit, 7)


def _clear(builder: Builder, y_rows: Value, num_rows: Value) -> None:
    with cgutils.for_range(builder, num_rows) as rows:
        y = v.load(builder, builder.add(y_rows, v.scaled(builder, rows.index, 8)), I64)
        for at in range(0, 4 * PANEL, 4 * LANES):
            v.store(builder, v.constant(0.0), v.offset(builder, y, at))


def _decoded(builder: Builder, group: Group, room: Value) -> Group:
    """The same with its weights in `room`."""
    for step in range(_STEPS):
        target = v.offset(builder, room, step * _ROW_BYTES)
        for index, columns in enumerate(group.four(step)):
            v.store(builder, columns, v.offset(builder, target, 4 * LANES * index))
    return Group(group.scales, lambda step: _row(builder, v.offset(builder, room, step * _ROW_BYTES)))


def _row(builder: Builder, at: Value) -> list[Value]:
    """Weights as the dot takes them."""
    return [v.load(builder, v.offset(builder, at, 4 * LANES * index), VI32) for index in range(_VECTORS)]


def _all_rows(
    builder: Builder,
    group: Group,
    zero: int,
    x_rows: Value,
    y_rows: Value,
    num_rows: Value,
    x_at: Value,
    sizes: tuple[int, ...],
) -> None:
    """All rows, so many at a time."""
    done = ir.Constant(I64, 0)
    for size in sizes:
        count = builder.udiv(builder.sub(num_rows, done), ir.Constant(I64, size))
        with cgutils.for_range(builder, count) as loop:
            first = v.scaled(builder, builder.add(done, v.scaled(builder, loop.index, size)), 8)
            pointers = [
                [
                    v.load(builder, v.offset(builder, builder.add(rows, first), 8 * row), I64)
                    for row in range(size)
                ]
                for rows in (x_rows, y_rows)
            ]
            _tile(builder, group, zero, [builder.add(x, x_at) for x in pointers[0]], pointers[1])
        done = builder.add(done, v.scaled(builder, count, size))


def _tile(builder: Builder, group: Group, zero: int, x_rows: list[Value], y_rows: list[Value]) -> None:
    sums = [[_first_sum(builder, x, zero)] * _VECTORS for x in x_rows]
    for step in range(_STEPS):
        columns = group.four(step)
        for x, accumulators in zip(x_rows, sums, strict=True):
            four = v.splat(builder, v.load(builder, v.offset(builder, x, 4 * step), I32))
            accumulators[:] = [
                v.dot4(builder, total, column, four)
                for total, column in zip(accumulators, columns, strict=True)
            ]
    for x, y, accumulators in zip(x_rows, y_rows, sums, strict=True):
        _add(builder, group.scales, x, y, accumulators)


def _prefetch(builder: Builder, address: Value, num_bytes: int) -> None:
    for at in range(0, num_bytes, _LINE):
        v.prefetch(builder, v.offset(builder, address, at))


def _first_sum(builder: Builder, x: Value, zero: int) -> Value:
    negative = v.load(builder, v.offset(builder, x, NEGATIVE_SUM), I32)
    return v.splat(builder, builder.mul(negative, ir.Constant(I32, zero)))


def _add(builder: Builder, scales: list[Value], x: Value, y: Value, sums: list[Value]) -> None:
    x_scale = v.splat(builder, v.load(builder, v.offset(builder, x, SCALE), F32))
    for index, (total, scale) in enumerate(zip(sums, scales, strict=True)):
        at = v.offset(builder, y, 4 * LANES * index)
        factor = builder.fmul(scale, x_scale)
        value = v.fma(builder, builder.sitofp(total, v.VF32), factor, v.load(builder, at))
        v.store(builder, value, at)


def _column_scales(builder: Builder, scale: Value) -> list[Value]:
    return [v.load(builder, v.offset(builder, scale, 4 * LANES * index)) for index in range(_VECTORS)]


def find_wint8(builder: Builder, panel: Value, scale: Value, group: Value) -> Group:
    """They are as the dot takes them."""
    source = builder.add(panel, v.scaled(builder, group, GROUP_SIZE * PANEL))

    def four(step: int) -> list[Value]:
        row = v.offset(builder, source, step * _ROW_BYTES)
        _prefetch(builder, v.offset(builder, row, _AHEAD), _ROW_BYTES)
        return _row(builder, row)

    return Group(_column_scales(builder, scale), four)


def find_wint4(builder: Builder, panel: Value, scale: Value, group: Value) -> Group:
    """Four low nibbles are four of k, the high ones the next four."""
    source, mask = (
        builder.add(panel, v.scaled(builder, group, GROUP_SIZE * PANEL // 2)),
        v.integer(0x0F0F0F0F),
    )

    def four(step: int) -> list[Value]:
        row = v.offset(builder, source, step // 2 * _ROW_BYTES)
        both = _row(builder, row)
        if step % 2:
            return [builder.and_(builder.lshr(pair, v.integer(4)), mask) for pair in both]
        _prefetch(builder, v.offset(builder, row, _AHEAD), _ROW_BYTES)
        return [builder.and_(pair, mask) for pair in both]

    return Group(_column_scales(builder, scale), four)


def find_wint2(builder: Builder, panel: Value, scale: Value, group: Value) -> Group:
    """A code's four fields to the bytes of a lane."""
    local, codes = find_group(builder, panel, group)
    parameters = code_parameters(builder, panel)

    def four(step: int) -> list[Value]:
        row = v.offset(builder, codes, step * PANEL)
        v.prefetch(builder, v.offset(builder, row, _AHEAD))
        points = [
            point_of(builder, v.offset(builder, row, LANES * index), pair)
            for index, pair in enumerate(parameters)
        ]
        return [_fields(builder, v.floor(builder, point)) for point in points]

    columns = _column_scales(builder, scale)
    return Group([builder.fmul(a, b) for a, b in zip(local, columns, strict=True)], four)


def _fields(builder: Builder, code: Value) -> Value:
    return builder.and_(_spread(builder, code), v.integer(0x3F3F3F3F))


def _spread(builder: Builder, code: Value) -> Value:
    """Bits 9, 6, 3 and 0 onwards to bytes 0 .. 3, whose two highest bits then say nothing."""
    if v.has_features("avx512vbmi"):
        return v.multishift(builder, code, (9, 6, 3, 0))
    even = builder.or_(builder.lshr(code, v.integer(9)), builder.shl(code, v.integer(13)))
    odd = builder.or_(builder.shl(code, v.integer(2)), builder.shl(code, v.integer(24)))
    mask = 0x003F003F
    return builder.or_(builder.and_(even, v.integer(mask)), builder.and_(odd, v.integer(mask << 8)))
