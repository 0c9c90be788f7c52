"""The nearest vector of a small codebook, for millions of vectors: the inner loop of every encoder here."""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    from cuda_kernels.formats import search_numba
except ImportError:  # numba comes with the `quantize` extra; torch does the same, some fifty times slower
    HAS_NUMBA = False
else:
    HAS_NUMBA = True

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # distances that exist at a time


class Nearest(NamedTuple):
    """The winners of a search over R rows of N targets."""

    found: Tensor  # int32 [R, N]
    score: Tensor  # f32 [R, N]: |c|²/2 - t·c, that is (|t - c|² - |t|²) / 2


def nearest(targets: Tensor, codebook: Tensor) -> Nearest:
    """The codebook vector nearest to each target: f32 [R, d, N], f32 [C, d] or [R, C, d].

    Minimises |t - c|²; a metric other than the plain one is a linear map of both arguments, hence the
    codebook per row. Ties go to the lower index.
    """
    books = codebook.unsqueeze(0) if codebook.ndim == 2 else codebook
    if HAS_NUMBA and targets.device.type == "cpu" and targets.shape[1] == 4:
        return Nearest(*search_numba.nearest(targets, books))
    return _nearest_torch(targets, books)


def sweep(
    targets: Tensor, scale: Tensor, book: Tensor, factors: Tensor, coupling: Tensor, reference: Tensor | None
) -> Tensor:
    """Choose the codes of one group one block of four rows after another, each choice moving the later
    targets.

    For block J: code_J = argmin |F_J (t_J - s·c)|², then t_I += coupling[I, J] (r_J - s·c) for every later
    I, where r is `reference`, or the target itself when None (error feedback). `targets` f32 [4B, N] is
    updated in place; `scale` f32 [N], `book` [C, 4], `factors` F [B, 4, 4], `coupling` [4B, 4B].
    Returns int32 [B, N].
    """
    if HAS_NUMBA and targets.device.type == "cpu":
        return search_numba.sweep(targets, scale, book, factors, coupling, reference)
    return _sweep_torch(targets, scale, book, factors, coupling, reference)


def sweep_levels(
    targets: Tensor, scale: Tensor, coupling: Tensor, reference: Tensor | None, most: int
) -> Tensor:
    """`sweep` for plain levels -`most` .. `most`, row after row: f32 `targets` [K, N] is updated in place,
    `scale` [N], `coupling` [K, K]; returns the levels f32 [K, N]."""
    scale = scale.float()
    if HAS_NUMBA and targets.device.type == "cpu":
        return search_numba.sweep_levels(targets, scale, coupling, reference, most)
    return _sweep_levels_torch(targets, scale, coupling, reference, most)


def _sweep_levels_torch(
    targets: Tensor, scale: Tensor, coupling: Tensor, reference: Tensor | None, most: int
) -> Tensor:
    origin = targets if reference is None else reference
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    levels = torch.empty_like(targets)
    for row in range(len(targets)):
        levels[row] = (targets[row] * inverse).round().clamp(-most, most)
        change = origin[row] - levels[row] * scale
        targets[row + 1 :] += coupling[row + 1 :, row : row + 1] * change
    return levels


def _nearest_torch(targets: Tensor, books: Tensor) -> Nearest:
    half_norm = books.square().sum(dim=-1, keepdim=True) / 2
    rows = max(1, _CHUNK_ELEMENTS[targets.device.type] // (books.shape[1] * max(1, targets.shape[2])))
    pieces = []
    for start in range(0, targets.shape[0], rows):
        book, norm = (t if t.shape[0] == 1 else t[start : start + rows] for t in (books, half_norm))
        pieces.append((norm - book @ targets[start : start + rows]).min(dim=1))
    return Nearest(torch.cat([p.indices.int() for p in pieces]), torch.cat([p.values for p in pieces]))


def _sweep_torch(
    targets: Tensor, scale: Tensor, book: Tensor, factors: Tensor, coupling: Tensor, reference: Tensor | None
) -> Tensor:
    origin = targets if reference is None else reference
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    found = []
    for block, factor in enumerate(factors):
        rows = slice(4 * block, 4 * block + 4)
        mapped = factor @ (targets[rows] * inverse)
        index = _nearest_torch(mapped.unsqueeze(0), (book @ factor.T).unsqueeze(0)).found[0]
        change = origin[rows] - book[index.long()].T * scale
        targets[rows.stop :] += coupling[rows.stop :, rows] @ change
        found.append(index)
    return torch.stack(found)
