"""Rows of x in 8 bits, 64 values at a time: what the integer kernels multiply.

    a group, 72 bytes       64 int8 | float32 scale | int32 -(sum of the 64)

value ≈ level · scale, levels -127 .. 127 by the group's largest magnitude. A NaN or an infinity makes the
group's scale one, and so what is computed from it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.arrays import Bytes
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.vector import I8, I32, LANES, VI32, Builder, Value
from cuda_kernels.formats.layout import GROUP_SIZE

SCALE, NEGATIVE_SUM = GROUP_SIZE, GROUP_SIZE + 4
GROUP_BYTES = GROUP_SIZE + 8
_MAX_LEVEL = 127.0


def _quantize(builder: Builder, values: Value, out: Value) -> None:
    """64 floats to a group."""
    lanes = [v.load(builder, v.offset(builder, values, 4 * at)) for at in range(0, GROUP_SIZE, LANES)]
    largest = v.constant(0.0)
    for part in lanes:
        largest = v.call(builder, "maximum", largest, v.call(builder, "fabs", part))
    largest = v.fold(builder, largest, lambda a, b: v.call(builder, "maximum", a, b))
    is_zero = builder.fcmp_ordered("==", largest, v.constant(0.0))
    factor = builder.fdiv(v.constant(_MAX_LEVEL), largest)
    factor = builder.select(is_zero, v.constant(0.0), factor)
    sums = v.integer(0)
    for index, part in enumerate(lanes):
        levels = builder.fptosi(v.call(builder, "rint", builder.fmul(part, factor)), VI32)
        sums = builder.add(sums, levels)
        v.store(builder, builder.trunc(levels, v.vector(I8)), v.offset(builder, out, LANES * index))
    scale = builder.fmul(largest, v.constant(1 / _MAX_LEVEL))
    first = ir.Constant(I32, 0)
    v.store(builder, builder.extract_element(scale, first), v.offset(builder, out, SCALE))
    negative = builder.neg(builder.extract_element(v.fold(builder, sums, builder.add), first))
    v.store(builder, negative, v.offset(builder, out, NEGATIVE_SUM))


quantize_group = v.kernel(_quantize, 2)


@compiled
def quantize_rows(x: int, stride: int, num_rows: int, width: int) -> Bytes:
    """Rows of `width` floats, whole groups, at an address."""
    num_groups = width // GROUP_SIZE
    out = np.empty((num_rows, num_groups * GROUP_BYTES), np.uint8)
    for row in range(num_rows):
        for group in range(num_groups):
            source = x + row * stride + group * 4 * GROUP_SIZE
            quantize_group(source, out[row, group * GROUP_BYTES :].ctypes.data)
    return out
