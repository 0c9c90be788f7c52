"""Triangular factors whose last bits do not depend on how many threads find them, as LAPACK's do.

Products and triangular solves of MKL split sums by the shape alone, and so do its factors of small matrices.
"""

import torch
from torch import Tensor

_LEAF = 128  # rows that one thread factors


def cholesky(matrix: Tensor) -> Tensor:
    """The lower L of L Lᵀ = `matrix` [K, K], which is positive definite: one half, then what it leaves of the
    other."""
    rows = len(matrix)
    if rows <= _LEAF:
        leaf: Tensor = torch.linalg.cholesky(matrix)
        return leaf
    half = max(_LEAF, rows // 2 // _LEAF * _LEAF)
    first = cholesky(matrix[:half, :half])
    below = torch.linalg.solve_triangular(first, matrix[half:, :half].mT, upper=False).mT
    rest = cholesky(matrix[half:, half:] - below @ below.mT)
    above = first.new_zeros(half, rows - half)
    return torch.cat([torch.cat([first, above], dim=1), torch.cat([below, rest], dim=1)])


def inverse_root(matrix: Tensor) -> Tensor:
    """The upper U of Uᵀ U = `matrix`⁻¹: the inverse of R in R Rᵀ = `matrix`, which is L found from the last
    row upwards."""
    root, one = cholesky(matrix.flip(0, 1)).flip(0, 1), torch.eye(len(matrix), device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, one, upper=True)
    return inverse
