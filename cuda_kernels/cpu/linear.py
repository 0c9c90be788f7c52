"""Compiled linear layer over weight panels: items of one panel and up to twelve rows.

An item's result does not depend on who computes it. Arguments are addresses, sizes and strides in bytes.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from cuda_kernels.cpu.arrays import Bytes, Ints
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.kernels import multiply
from cuda_kernels.cpu.quantized import quantize_rows
from cuda_kernels.cpu.team import enter, run, take
from cuda_kernels.cpu.vector import keep, pointer

# Rows of an item: two tiles of six.
CHUNK = 12
PANEL_BYTES = 256  # of 64 float32 results


def job(arguments: int) -> None:
    """Take items until there is none left."""
    given = carray(pointer(arguments), (13,), np.int64)
    kernel, x, x_stride, y, y_stride, num_rows = given[1], given[2], given[3], given[4], given[5], given[6]
    panels, stride, num_panels, scale, num_k = given[7], given[8], given[9], given[10], given[11]
    x_rows, y_rows = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    num_chunks = (num_rows + CHUNK - 1) // CHUNK
    num_items = num_panels * num_chunks
    item, place = take(arguments, enter(arguments), num_items)
    while item < num_items:
        panel, first = item // num_chunks, item % num_chunks * CHUNK
        count = min(CHUNK, num_rows - first)
        for row in range(count):
            x_rows[row] = x + (first + row) * x_stride
            y_rows[row] = y + (first + row) * y_stride + panel * PANEL_BYTES
        weights, factors = panels + panel * stride, scale + panel * PANEL_BYTES if scale else 0
        multiply(kernel, x_rows.ctypes.data, y_rows.ctypes.data, count, weights, factors, num_k, 0)
        item, place = take(arguments, place, num_items)
    keep(x_rows)
    keep(y_rows)


@compiled
def prepare(
    kernel: int,
    x: tuple[int, int],
    y: tuple[int, int],
    num_rows: int,
    panels: tuple[int, int, int],
    scale: int,
    num_k: int,
    quantizes: bool,
) -> tuple[Ints, Bytes]:
    """What the job takes for y = scale · (x · W), and what of it must be kept until that is done.

    `x`, `y`: address and stride, of whole panels in y; `panels`: address, bytes from one to the next, number.
    """
    levels = quantize_rows(x[0], x[1], num_rows if quantizes else 0, num_k)
    if quantizes:
        x = levels.ctypes.data, levels.shape[1]
    given = np.zeros(13, np.int64)
    given[1], given[6], given[10], given[11] = kernel, num_rows, scale, num_k
    given[2], given[3], given[4], given[5] = x[0], x[1], y[0], y[1]
    given[7], given[8], given[9] = panels[0], panels[1], panels[2]
    return given, levels


@compiled
def linear(
    team: tuple[int, int],
    share: int,
    kernel: int,
    x: tuple[int, int],
    y: tuple[int, int],
    num_rows: int,
    panels: tuple[int, int, int],
    scale: int,
    num_k: int,
    quantizes: bool,
) -> None:
    """y = scale · (x · W), by the compiled job `share`; see `prepare`."""
    given, levels = prepare(kernel, x, y, num_rows, panels, scale, num_k, quantizes)
    run(team, ((share, given.ctypes.data),))
    keep(given)
    keep(levels)
