"""Ops `rms_norm` and `add_rms_norm`: root-mean-square normalization, alone and fused with the residual sum.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) in float32, cast to x's dtype, times weight: [T, D]."""
    x_f32 = x_TD.float()
    variance_T1 = x_f32.square().mean(-1, keepdim=True)
    return (x_f32 * torch.rsqrt(variance_T1 + eps)).to(x_TD.dtype) * weight_D


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its RMS norm: (normed [T, D], residual [T, D])."""
    residual_TD = residual_TD + x_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD
