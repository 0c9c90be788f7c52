"""The integer kernel: rows of x in 8 bits times one panel of 64 weight columns, for CPUs that have VNNI.

A row of x is quantized in groups of 64 values (`quantized.py`). One instruction multiplies four of its bytes
with four weights of each of 16 columns:

    sum[row, column]  = Σ x[row, k] · (u[k, column] - zero)            exact, in int32; u is unsigned
    y[row, column]   += sum · (x's scale[row, group] · weight scale[group, column])        for group 0, 1, …

A group's weights are decoded once, to 4 KiB, for all rows. Sums are exact and a row's groups are added in
order: a row has the same bits in every batch. `panels.py` draws the formats.
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
_TILE_ROWS = (4, 1)
_LINE = 64
# A CPU's own prefetching ends with each page, so the next page is asked for here.
_AHEAD = 4096


@dataclass(frozen=True, slots=True)
class Weights:
    """A group of a panel: where its bytes [16, 64 columns, 4 of k] are, and the columns' float32 scales."""

    address: Value
    scales: list[Value]
    is_panel: bool = False  # read where it is stored, and the next group after it


# Finds or decodes group `group` of the panel, given the addresses of panel, column scales and 4 KiB of room.
Decode = Callable[[Builder, Value, Value, Value, Value], Weights]


def panel_dot(decode: Decode, zero: int) -> Any:
    """The kernel of a format, as `tiles.panel_product`, but x_rows point to quantized rows."""

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
        with cgutils.for_range(builder, builder.udiv(num_k, ir.Constant(I64, GROUP_SIZE))) as groups:
            weights = decode(builder, panel, scale, groups.index, room)
            x_at = v.scaled(builder, groups.index, GROUP_BYTES)
            _all_rows(builder, weights, zero, x_rows, y_rows, num_rows, x_at)

    return v.kernel(emit, 7)


def _clear(builder: Builder, y_rows: Value, num_rows: Value) -> None:
    with cgutils.for_range(builder, num_rows) as rows:
        y = v.load(builder, builder.add(y_rows, v.scaled(builder, rows.index, 8)), I64)
        for at in range(0, 4 * PANEL, 4 * LANES):
            v.store(builder, v.constant(0.0), v.offset(builder, y, at))


def _all_rows(
    builder: Builder, weights: Weights, zero: int, x_rows: Value, y_rows: Value, num_rows: Value, x_at: Value
) -> None:
    done = ir.Constant(I64, 0)
    for size in _TILE_ROWS:
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
            _tile(builder, weights, zero, [builder.add(x, x_at) for x in pointers[0]], pointers[1])
        done = builder.add(done, v.scaled(builder, count, size))


def _tile(builder: Builder, weights: Weights, zero: int, x_rows: list[Value], y_rows: list[Value]) -> None:
    sums = [[_first_sum(builder, x, zero)] * _VECTORS for x in x_rows]
    for step in range(GROUP_SIZE // 4):
        row = v.offset(builder, weights.address, step * _ROW_BYTES)
        columns = [v.load(builder, v.offset(builder, row, 4 * LANES * i), VI32) for i in range(_VECTORS)]
        if weights.is_panel and len(x_rows) == 1:
            _prefetch(builder, v.offset(builder, row, _AHEAD), _ROW_BYTES)
        for x, accumulators in zip(x_rows, sums, strict=True):
            four = v.splat(builder, v.load(builder, v.offset(builder, x, 4 * step), I32))
            accumulators[:] = [
                v.dot4(builder, total, column, four)
                for total, column in zip(accumulators, columns, strict=True)
            ]
    for x, y, accumulators in zip(x_rows, y_rows, sums, strict=True):
        _add(builder, weights.scales, x, y, accumulators)


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


def decode_wint8(builder: Builder, panel: Value, scale: Value, group: Value, _: Value) -> Weights:
    """They are as the dot takes them."""
    address = builder.add(panel, v.scaled(builder, group, GROUP_SIZE * PANEL))
    return Weights(address, _column_scales(builder, scale), is_panel=True)


def decode_wint4(builder: Builder, panel: Value, scale: Value, group: Value, room: Value) -> Weights:
    """Four low nibbles are four of k, the high ones the next four."""
    source = builder.add(panel, v.scaled(builder, group, GROUP_SIZE * PANEL // 2))
    mask = v.integer(0x0F0F0F0F)
    with cgutils.for_range(builder, ir.Constant(I64, GROUP_SIZE // 8)) as rows:
        row = builder.add(source, v.scaled(builder, rows.index, _ROW_BYTES))
        target = builder.add(room, v.scaled(builder, rows.index, 2 * _ROW_BYTES))
        _prefetch(builder, v.offset(builder, row, _AHEAD), _ROW_BYTES)
        for at in range(0, _ROW_BYTES, 4 * LANES):
            both = v.load(builder, v.offset(builder, row, at), VI32)
            v.store(builder, builder.and_(both, mask), v.offset(builder, target, at))
            high = builder.and_(builder.lshr(both, v.integer(4)), mask)
            v.store(builder, high, v.offset(builder, target, _ROW_BYTES + at))
    return Weights(room, _column_scales(builder, scale))


def decode_wint2(builder: Builder, panel: Value, scale: Value, group: Value, room: Value) -> Weights:
    """A code's four fields to the bytes of a lane."""
    local, codes = find_group(builder, panel, group)
    parameters = code_parameters(builder, panel)
    with cgutils.for_range(builder, ir.Constant(I64, GROUP_SIZE // 4)) as rows:
        row = builder.add(codes, v.scaled(builder, rows.index, PANEL))
        target = builder.add(room, v.scaled(builder, rows.index, _ROW_BYTES))
        v.prefetch(builder, v.offset(builder, row, _AHEAD))
        for index in range(_VECTORS):
            at = v.offset(builder, row, LANES * index)
            code = v.floor(builder, point_of(builder, at, parameters[index]))
            fields = builder.and_(_spread(builder, code), v.integer(0x3F3F3F3F))
            v.store(builder, fields, v.offset(builder, target, 4 * LANES * index))
    columns = _column_scales(builder, scale)
    return Weights(room, [builder.fmul(a, b) for a, b in zip(local, columns, strict=True)])


def _spread(builder: Builder, code: Value) -> Value:
    """Bits 9, 6, 3 and 0 onwards to bytes 0 .. 3, whose two highest bits then say nothing."""
    if v.has_features("avx512vbmi"):
        return v.multishift(builder, code, (9, 6, 3, 0))
    even = builder.or_(builder.lshr(code, v.integer(9)), builder.shl(code, v.integer(13)))
    odd = builder.or_(builder.shl(code, v.integer(2)), builder.shl(code, v.integer(24)))
    mask = 0x003F003F
    return builder.or_(builder.and_(even, v.integer(mask)), builder.and_(odd, v.integer(mask << 8)))
