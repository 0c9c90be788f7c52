"""Viterbi's algorithm on a CPU, a column a task: the costs of all states stay in the second-level cache."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cuda_kernels.formats.threads import use_threads

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Longs = NDArray[np.int64]


def viterbi(targets: Tensor, weights: Tensor, start: Tensor, levels: Tensor) -> Tensor:
    """`trellis.viterbi`; `levels` f32 [65536]."""
    use_threads(targets.numel() * len(levels))
    symbols = np.empty(tuple(targets.shape), np.uint8)
    columns = targets.T.contiguous().numpy()
    _viterbi(columns, weights.contiguous().numpy(), start.contiguous().numpy(), levels.numpy(), symbols)
    return torch.from_numpy(symbols)


@numba.njit(parallel=True, fastmath=True, cache=True)
def _viterbi(columns: Floats, weights: Floats, start: Longs, levels: Floats, symbols: Bytes) -> None:
    num_columns, steps = columns.shape
    tails = levels.shape[0] // 4
    for column in numba.prange(num_columns):
        cost = np.full(levels.shape[0], np.float32(1e30), np.float32)
        cost[start[column]] = np.float32(0)
        least = np.empty(tails, np.float32)
        origins = np.empty((steps, tails), np.uint8)
        for step in range(steps):
            _survive(cost, least, origins[step])
            _extend(cost, least, levels, columns[column, step], weights[step])
        state = np.argmin(cost)
        for back in range(steps):
            step = steps - 1 - back
            symbols[step, column] = state & 3
            tail = state >> 2
            state = tail + tails * np.int64(origins[step, tail])


@numba.njit(fastmath=True, cache=True)
def _survive(cost: Floats, least: Floats, origin: Bytes) -> None:
    """Of the four states with the same tail the cheapest."""
    tails = least.shape[0]
    for tail in range(tails):
        best, number = cost[tail], np.uint8(0)
        for part in range(1, 4):
            other = cost[tail + part * tails]
            number = np.uint8(part) if other < best else number
            best = min(best, other)
        least[tail], origin[tail] = best, number


@numba.njit(fastmath=True, cache=True)
def _extend(cost: Floats, least: Floats, levels: Floats, target: np.float32, weight: np.float32) -> None:
    for tail in range(least.shape[0]):
        for symbol in range(4):
            error = target - levels[4 * tail + symbol]
            cost[4 * tail + symbol] = least[tail] + weight * error * error
