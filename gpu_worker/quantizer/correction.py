"""Corrections that cost no stored bit: before weights are rounded, they move towards the original's outputs.

The quantized prefix hands each layer inputs that are a little off. Projections that read them are made to see
through the drift, and those that feed the residual stream are fitted to the original's stream, instead of to
their own old weights. Shapes: R rows, K inputs, N outputs.
"""

import torch
from torch import Tensor

from cuda_kernels.formats.factors import cholesky

RIDGE = 0.2  # of the mean second moment: how firmly a weight holds to its old value


def moment(x_RK: Tensor) -> Tensor:
    """Σ x xᵀ over rows, f32 [K, K]."""
    return x_RK.T @ x_RK


def fit(moment_KK: Tensor, x_RK: Tensor, short_RN: Tensor) -> Tensor:
    """The change [K, N] of a weight that reads x, of moment Σ x xᵀ, which makes up for what its output lacks.

    Ridge least squares, gone along with as far as it holds on rows that it has not seen: what is fitted to
    one half of the rows is scaled by what suits the other half best.
    """
    change_KN = _solve(moment_KK, x_RK, short_RN)
    halves = list(zip(x_RK.chunk(2), short_RN.chunk(2), strict=True))
    agreed, size = 0.0, 0.0
    for (x, short), (other_x, other_short) in zip(halves, reversed(halves), strict=True):
        foretold = other_x @ _solve(moment(x), x, short)
        agreed += _total(foretold * other_short)
        size += _total(foretold.square())
    return change_KN * min(1.0, max(0.0, agreed / size if size else 0.0))


def _solve(moment_KK: Tensor, x_RK: Tensor, short_RN: Tensor) -> Tensor:
    ridge = RIDGE * moment_KK.diagonal().mean().clamp(min=1e-30)
    damped = moment_KK + ridge * torch.eye(moment_KK.shape[0], device=moment_KK.device)
    return torch.cholesky_solve(x_RK.T @ short_RN, cholesky(damped))


def _total(square_RN: Tensor) -> float:
    """The sum, column after column: one over all at once is split by the number of threads."""
    return float(square_RN.sum(dim=0).sum())
