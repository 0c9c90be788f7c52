"""Ops `rms_norm` and `add_rms_norm`: root-mean-square normalization, alone and fused with the residual sum.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu, has_compiled
from cuda_kernels.launch import Device, check, cuda_device

_VECTOR, _MAX_THREADS, _MAX_VECTORS = 8, 1024, 2  # as in csrc/norm.cu


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) in float32, cast to x's dtype, times weight: [T, D]."""
    if _has_kernel(x_TD):
        return launch_rms_norm(cuda_device(x_TD.device.index), x_TD, None, weight_D, eps)[0]
    if has_compiled(x_TD):
        return cpu.rms_norm(x_TD, weight_D, eps)
    x_f32 = x_TD.float()
    variance_T1 = x_f32.square().mean(-1, keepdim=True)
    return (x_f32 * torch.rsqrt(variance_T1 + eps)).to(x_TD.dtype) * weight_D


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its RMS norm: (normed [T, D], residual [T, D])."""
    if _has_kernel(x_TD):
        return launch_rms_norm(cuda_device(x_TD.device.index), x_TD, residual_TD, weight_D, eps)
    if has_compiled(x_TD):
        return cpu.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    residual_TD = residual_TD + x_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD


def _has_kernel(x_TD: torch.Tensor) -> bool:
    width = x_TD.shape[-1]
    fits = width % _VECTOR == 0 and width <= _VECTOR * _MAX_THREADS * _MAX_VECTORS
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and fits


def launch_rms_norm(
    device: Device, x_TD: torch.Tensor, residual_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel: (normed, residual + x), or (normed, x) without a residual."""
    num_tokens, width = x_TD.shape
    check("x_TD", x_TD, (num_tokens, width), (torch.bfloat16,))
    check("weight_D", weight_D, (width,), (torch.bfloat16,))
    if residual_TD is not None:
        check("residual_TD", residual_TD, (num_tokens, width), (torch.bfloat16,))
    normed_TD = torch.empty_like(x_TD)
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    vectors = width // _VECTOR
    threads = min(_MAX_THREADS, -(-vectors // 32) * 32)
    if num_tokens:
        arguments = [x_TD, residual_TD, weight_D, normed_TD, sum_TD, vectors, threads, float(eps)]
        device.launch(Variant("norm"), "rms_norm", (num_tokens, 1), threads, 128, arguments, overlaps=True)
    return normed_TD, sum_TD
