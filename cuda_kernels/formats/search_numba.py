"""Nearest 4-vectors on a CPU: one code against 64 columns at a time, so that every lane of a vector unit
works."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cuda_kernels.formats.threads import use_threads

_LANES = 64

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


def nearest(targets: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """`search.nearest` for d = 4: f32 [R, 4, N], f32 [1 or R, C, 4] -> int32 [R, N], f32 [R, N]."""
    shape = targets.shape[0], targets.shape[2]
    if len(books) == 1 and shape[1] % _LANES:  # rows side by side fill the lanes
        targets = targets.transpose(0, 1).reshape(1, 4, -1)
    rows, _, columns = targets.shape
    use_threads(rows * columns * books.shape[1])
    index, score = np.empty((rows, columns), np.int32), np.empty((rows, columns), np.float32)
    _nearest(targets.contiguous().numpy(), books.contiguous().numpy(), index, score)
    return torch.from_numpy(index).view(shape), torch.from_numpy(score).view(shape)


def sweep(
    targets: Tensor, scale: Tensor, book: Tensor, factors: Tensor, coupling: Tensor, reference: Tensor | None
) -> Tensor:
    """`search.sweep`; a tile of columns stays in the first-level cache for the whole group."""
    use_threads(factors.shape[0] * targets.shape[1] * len(book))
    index = np.empty((factors.shape[0], targets.shape[1]), np.int32)
    origin = targets if reference is None else reference
    parts = (scale, book, book @ factors.mT, factors, coupling, origin)
    scale_, book_, books, factors_, coupling_, origin_ = (part.contiguous().numpy() for part in parts)
    _sweep(targets.numpy(), scale_, book_, books, factors_, coupling_, origin_, reference is None, index)
    return torch.from_numpy(index)


def sweep_levels(
    targets: Tensor, scale: Tensor, coupling: Tensor, reference: Tensor | None, most: int
) -> Tensor:
    """`search.sweep_levels`, a tile of columns at a time."""
    use_threads(targets.numel() * len(targets))
    levels = torch.empty_like(targets)
    origin = targets if reference is None else reference
    parts = (targets, levels, scale, coupling, origin)
    moved, found, scale_, coupling_, origin_ = (part.contiguous().numpy() for part in parts)
    _sweep_levels(moved, found, scale_, coupling_, origin_, reference is None, np.float32(most))
    return levels


@numba.njit(parallel=True, fastmath=True, cache=True)
def _sweep_levels(
    targets: Floats,
    levels: Floats,
    scale: Floats,
    coupling: Floats,
    origin: Floats,
    feedback: bool,
    most: np.float32,
) -> None:
    rows, columns = targets.shape
    for work in numba.prange((columns + _LANES - 1) // _LANES):
        start = work * _LANES
        stop = min(start + _LANES, columns)
        tile = targets[:, start:stop].copy()
        size = scale[start:stop]
        change = np.empty(stop - start, np.float32)
        for row in range(rows):
            base = tile[row] if feedback else origin[row, start:stop]
            for lane in range(stop - start):
                level = np.rint(tile[row, lane] / size[lane]) if size[lane] != 0 else np.float32(0)
                level = min(max(level, -most), most)
                levels[row, start + lane] = level
                change[lane] = base[lane] - level * size[lane]
            for later in range(row + 1, rows):
                weight = coupling[later, row]
                for lane in range(stop - start):
                    tile[later, lane] += weight * change[lane]
        targets[:, start:stop] = tile


@numba.njit(parallel=True, fastmath=True, cache=True)
def _nearest(targets: Floats, books: Floats, index: Ints, score: Floats) -> None:
    rows, columns = index.shape
    tiles = (columns + _LANES - 1) // _LANES
    for work in numba.prange(rows * tiles):
        row, start = work // tiles, (work % tiles) * _LANES
        stop = min(start + _LANES, columns)
        tile = np.zeros((4, _LANES), np.float32)
        tile[:, : stop - start] = targets[row, :, start:stop]
        found, least = _nearest_tile(tile, books[row if books.shape[0] > 1 else 0])
        index[row, start:stop] = found[: stop - start]
        score[row, start:stop] = least[: stop - start]


@numba.njit(fastmath=True, cache=True)
def _nearest_tile(tile: Floats, book: Floats) -> tuple[Ints, Floats]:
    least = np.full(_LANES, np.float32(np.inf), np.float32)
    found = np.zeros(_LANES, np.int32)
    for code in range(book.shape[0]):
        c0, c1, c2, c3 = book[code, 0], book[code, 1], book[code, 2], book[code, 3]
        half_norm = np.float32(0.5) * (c0 * c0 + c1 * c1 + c2 * c2 + c3 * c3)
        for lane in range(_LANES):
            dot = c0 * tile[0, lane] + c1 * tile[1, lane] + c2 * tile[2, lane] + c3 * tile[3, lane]
            distance = half_norm - dot
            closer = distance < least[lane]
            least[lane] = distance if closer else least[lane]
            found[lane] = code if closer else found[lane]
    return found, least


@numba.njit(parallel=True, fastmath=True, cache=True)
def _sweep(
    targets: Floats,
    scale: Floats,
    plain: Floats,
    books: Floats,
    factors: Floats,
    coupling: Floats,
    origin: Floats,
    feedback: bool,
    index: Ints,
) -> None:
    rows, columns = targets.shape
    for work in numba.prange((columns + _LANES - 1) // _LANES):
        start = work * _LANES
        width = min(_LANES, columns - start)
        tile = np.zeros((rows, _LANES), np.float32)
        tile[:, :width] = targets[:, start : start + width]
        base = np.zeros((rows, _LANES), np.float32)
        base[:, :width] = origin[:, start : start + width]
        size = np.zeros(_LANES, np.float32)
        size[:width] = scale[start : start + width]
        for block in range(books.shape[0]):
            mapped = _map_block(tile, size, factors[block], 4 * block)
            found, _ = _nearest_tile(mapped, books[block])
            index[block, start : start + width] = found[:width]
            change = _change(tile if feedback else base, size, plain, found, 4 * block)
            _spread(tile, coupling, change, 4 * block)
        targets[:, start : start + width] = tile[:, :width]


@numba.njit(fastmath=True, cache=True)
def _map_block(tile: Floats, size: Floats, factor: Floats, row: int) -> Floats:
    mapped = np.zeros((4, _LANES), np.float32)
    for i in range(4):
        for j in range(4):
            for lane in range(_LANES):
                mapped[i, lane] += factor[i, j] * tile[row + j, lane]
    for i in range(4):
        for lane in range(_LANES):
            mapped[i, lane] = mapped[i, lane] / size[lane] if size[lane] > 0 else np.float32(0)
    return mapped


@numba.njit(fastmath=True, cache=True)
def _change(base: Floats, size: Floats, plain: Floats, found: Ints, row: int) -> Floats:
    change = np.empty((4, _LANES), np.float32)
    for i in range(4):
        for lane in range(_LANES):
            change[i, lane] = base[row + i, lane] - size[lane] * plain[found[lane], i]
    return change


@numba.njit(fastmath=True, cache=True)
def _spread(tile: Floats, coupling: Floats, change: Floats, row: int) -> None:
    for later in range(row + 4, tile.shape[0]):
        for i in range(4):
            weight = coupling[later, row + i]
            for lane in range(_LANES):
                tile[later, lane] += weight * change[i, lane]
