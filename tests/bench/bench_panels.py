"""The CPU's panel kernels alone, one core: weights a second for one row, multiply-adds a second for many.

python -m tests.bench.bench_panels
"""

from __future__ import annotations

import time

import numba
import numpy as np
import torch

from cuda_kernels.cpu import kernels
from cuda_kernels.cpu.quantized import quantize_rows

INPUTS, PANELS, ROUNDS = 576, 32, 30
BYTES = {"float32": 256 * INPUTS, "bfloat16": 128 * INPUTS, "wint8": 64 * INPUTS, "wint4": 32 * INPUTS}
BYTES["wint2"] = 512 + 5 * (64 + 2048)
BYTES |= {f"{name}_dot": BYTES[name] for name in ("wint8", "wint4", "wint2")}


@numba.njit(nogil=True)
def products(kernel, x_rows, y_rows, num_rows, data, scale, panel_bytes):
    for panel in range(PANELS):
        weights = data + panel * panel_bytes
        kernels.multiply(kernel, x_rows, y_rows, num_rows, weights, scale, INPUTS, 0)


def rate(name: str, num_rows: int) -> float:
    """Multiply-adds a second, best of the rounds."""
    data = torch.full((PANELS * 64 * INPUTS,), 0.5)  # which starts at a cache line, as weights do
    x, y = np.ones((num_rows, INPUTS), np.float32), np.zeros((num_rows, 64), np.float32)
    if name.endswith("_dot"):
        x = quantize_rows(x.ctypes.data, x.strides[0], num_rows, INPUTS)
    scale = np.ones(64, np.float32)
    x_rows, y_rows = (np.array([row.ctypes.data for row in rows]) for rows in (x, y))
    addresses = x_rows.ctypes.data, y_rows.ctypes.data, num_rows, data.data_ptr(), scale.ctypes.data
    best = np.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        products(kernels.address_of(name), *addresses, BYTES[name])
        best = min(best, time.perf_counter() - start)
    return num_rows * 64 * INPUTS * PANELS / best


def main() -> None:
    print(f"{'':>10}{'1 row':>10}{'6 rows':>10}{'48 rows':>10}   Gmac/s, one core")
    for name in BYTES:
        rates = [rate(name, num_rows) / 1e9 for num_rows in (1, 6, 48)]
        print(f"{name:>10}" + "".join(f"{value:>10.1f}" for value in rates))


if __name__ == "__main__":
    main()
