"""Corrections that cost no stored bit: before weights are rounded, they move towards the original's outputs.

The quantized prefix hands each layer inputs that are a little off. A projection whose output feeds the
residual stream is therefore fitted to the original's stream on those inputs, instead of to its own old
weights.
"""

import torch
from torch import Tensor

RIDGE = 0.02  # of the mean second moment: how firmly a weight holds to its old value


def moment(x_RK: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Σ w² x xᵀ over rows, f32 [K, K]."""
    scaled = x_RK if weights_R is None else x_RK * weights_R.unsqueeze(1)
    return scaled.T @ scaled


def step(moment_KK: Tensor, x_RK: Tensor, residual_RN: Tensor) -> Tensor:
    """The change of a weight [K, N] that answers `residual` best: ridge least squares of residual on x."""
    ridge = RIDGE * moment_KK.diagonal().mean().clamp(min=1e-30)
    damped = moment_KK + ridge * torch.eye(moment_KK.shape[0], device=moment_KK.device)
    return torch.cholesky_solve(x_RK.T @ residual_RN, torch.linalg.cholesky(damped))
