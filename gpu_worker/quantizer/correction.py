"""Corrections that cost no stored bit: before weights are rounded, they move towards the original's outputs.

The quantized prefix hands each layer inputs that are a little off. Projections that read them are made to see
through the drift, and those that feed the residual stream are fitted to the original's stream, instead of to
their own old weights. Shapes: R rows, K inputs, N outputs.
"""

import torch
from torch import Tensor

RIDGE = 0.2  # of the mean second moment: how firmly a weight holds to its old value


def moment(x_RK: Tensor) -> Tensor:
    """Σ x xᵀ over rows, f32 [K, K]."""
    return x_RK.T @ x_RK


def refit(weight_KN: Tensor, moment_KK: Tensor, short_KN: Tensor) -> Tensor:
    """The weight that makes up for what its output lacks: ridge least squares of `short` = xᵀ·lack on x."""
    return weight_KN + _solve(moment_KK, short_KN)


def see_through(moment_KK: Tensor, x_RK: Tensor, original_RK: Tensor) -> Tensor:
    """P [K, K] such that x·(W + P·W) is near original·W for any weight W that reads x."""
    return _solve(moment_KK, x_RK.T @ (original_RK - x_RK))


def _solve(moment_KK: Tensor, right_KN: Tensor) -> Tensor:
    ridge = RIDGE * moment_KK.diagonal().mean().clamp(min=1e-30)
    damped = moment_KK + ridge * torch.eye(moment_KK.shape[0], device=moment_KK.device)
    return torch.cholesky_solve(right_KN, torch.linalg.cholesky(damped))
