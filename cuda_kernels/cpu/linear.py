"""Compiled linear layer over weight panels, shared out among the threads.

Work is cut into items, which the threads take one after another from a counter; an item's result does not
depend on who computes it. Arguments are addresses, sizes and strides in bytes.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import prange

from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.kernels import multiply
from cuda_kernels.cpu.vector import I64, Builder, Value

# Rows of an item: two tiles of six.
CHUNK = 12
PANEL_BYTES = 256  # of 64 float32 results


def _fetch_add(builder: Builder, address: Value) -> Value:
    counter = builder.inttoptr(address, I64.as_pointer())
    return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")


# In compiled code: the number at an address, which it counts up for all threads at once.
take = v.function(_fetch_add, 1)


@numba.njit(nogil=True, cache=True)
def _share(
    counter: int,
    kernel: int,
    x: tuple[int, int],
    y: tuple[int, int],
    num_rows: int,
    panels: tuple[int, int, int],
    scale: int,
    num_k: int,
) -> None:
    x_rows, y_rows = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    first_panel, panel_bytes, num_panels = panels
    num_chunks = (num_rows + CHUNK - 1) // CHUNK
    item = take(counter)
    while item < num_panels * num_chunks:
        panel, first = item // num_chunks, item % num_chunks * CHUNK
        count = min(CHUNK, num_rows - first)
        for row in range(count):
            x_rows[row] = x[0] + (first + row) * x[1]
            y_rows[row] = y[0] + (first + row) * y[1] + panel * PANEL_BYTES
        weights, factors = first_panel + panel * panel_bytes, scale + panel * PANEL_BYTES if scale else 0
        multiply(kernel, x_rows.ctypes.data, y_rows.ctypes.data, count, weights, factors, num_k, 0)
        item = take(counter)


@numba.njit(nogil=True, parallel=True, cache=True)
def linear(
    num_threads: int,
    kernel: int,
    x: tuple[int, int],
    y: tuple[int, int],
    num_rows: int,
    panels: tuple[int, int, int],
    scale: int,
    num_k: int,
) -> None:
    """y = scale · (x · W). `x`, `y`: address and stride; `panels`: address, bytes of one, how many.

    y's rows have room for whole panels.
    """
    counter = np.zeros(1, np.int64)
    for _ in prange(num_threads):
        _share(counter.ctypes.data, kernel, x, y, num_rows, panels, scale, num_k)
