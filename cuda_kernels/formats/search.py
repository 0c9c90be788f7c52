"""The nearest vector of a small codebook, for millions of vectors: the inner loop of every encoder here."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from cuda_kernels.formats import search_numba as _numba
except (
    ImportError
):  # numba comes with the `quantize` extra; torch does the same work, some fifty times slower
    numba_search: ModuleType | None = None
else:
    numba_search = _numba

_CHUNK_ELEMENTS = 1 << 22


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
    if numba_search is not None and targets.device.type == "cpu" and targets.shape[1] == 4:
        return Nearest(*numba_search.nearest(targets, books))
    return _nearest_torch(targets, books)


def sweep(
    targets: Tensor, scale: Tensor, books: Tensor, factors: Tensor, coupling: Tensor, reference: Tensor | None
) -> Tensor:
    """Choose the codes of one group one block of four rows after another, each choice moving the later
    targets.

    For block J: code_J = argmin |F_J (t_J - s·c)|², then t_I += coupling[I, J] (r_J - s·c) for every later
    I, where r is `reference`, or the target itself when None (error feedback). `targets` f32 [4B, N] is
    updated in place; `scale` f32 [N], `books` [B, C, 4] already mapped by F, `factors` F [B, 4, 4],
    `coupling` [4B, 4B]. Returns int32 [B, N].
    """
    if numba_search is not None and targets.device.type == "cpu":
        return numba_search.sweep(targets, scale, books, factors, coupling, reference)
    return _sweep_torch(targets, scale, books, factors, coupling, reference)


def _nearest_torch(targets: Tensor, books: Tensor) -> Nearest:
    half_norm = books.square().sum(dim=-1, keepdim=True) / 2
    rows = max(1, _CHUNK_ELEMENTS // (books.shape[1] * max(1, targets.shape[2])))
    pieces = []
    for start in range(0, targets.shape[0], rows):
        book, norm = (t if t.shape[0] == 1 else t[start : start + rows] for t in (books, half_norm))
        pieces.append((norm - book @ targets[start : start + rows]).min(dim=1))
    return Nearest(torch.cat([p.indices.int() for p in pieces]), torch.cat([p.values for p in pieces]))


def _sweep_torch(
    targets: Tensor, scale: Tensor, books: Tensor, factors: Tensor, coupling: Tensor, reference: Tensor | None
) -> Tensor:
    origin = targets if reference is None else reference
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    found = []
    for block in range(books.shape[0]):
        rows = slice(4 * block, 4 * block + 4)
        index = _nearest_torch(
            (factors[block] @ (targets[rows] * inverse))[None], books[block : block + 1]
        ).found[0]
        values = torch.linalg.solve(factors[block], books[block][index.long()].T) * scale
        targets[4 * block + 4 :] += coupling[4 * block + 4 :, rows] @ (origin[rows] - values)
        found.append(index)
    return torch.stack(found)
