"""Op `route`: which experts a token goes to, and with what weights.

    p = softmax(logits)                      float32
    ids = top-k of p + correction bias       the bias takes part in the choice only; ties: lower id first
    weights = p[ids] / max(sum p[ids], norm_min)

as ERNIE 4.5 routes (Hugging Face's Ernie4_5_MoeTopKRouter).
Shapes: T tokens, E experts, A activated experts per token.
"""

from __future__ import annotations

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu
from cuda_kernels.launch import Argument, Device, check, cuda_device

_WARPS = 4  # as in csrc/route.cu


def route(
    logits_TE: torch.Tensor, correction_bias_E: torch.Tensor, num_experts_per_token: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_ids [T, A] int32, expert_weights [T, A] float32), the best expert first."""
    if logits_TE.is_cuda:
        device = cuda_device(logits_TE.device.index)
        return launch_route(device, logits_TE, correction_bias_E, num_experts_per_token, norm_min)
    if cpu is not None and logits_TE.dtype == torch.float32:
        return cpu.route(logits_TE, correction_bias_E, num_experts_per_token, norm_min)
    probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
    scores_TE = probabilities_TE + correction_bias_E
    ids_TE = torch.argsort(scores_TE, dim=-1, descending=True, stable=True)
    ids_TA = ids_TE[:, :num_experts_per_token]
    weights_TA = probabilities_TE.gather(-1, ids_TA)
    weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True).clamp(min=norm_min)
    return ids_TA.int(), weights_TA


def launch_route(
    device: Device,
    logits_TE: torch.Tensor,
    correction_bias_E: torch.Tensor,
    num_experts_per_token: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel, a warp a token; at most 32 experts a token."""
    num_tokens, num_experts = logits_TE.shape
    check("logits_TE", logits_TE, (num_tokens, num_experts), (torch.float32,))
    check("correction_bias_E", correction_bias_E, (num_experts,), (torch.float32,))
    if num_experts_per_token > 32:
        raise ValueError(f"num_experts_per_token: the kernel chooses at most 32, got {num_experts_per_token}")
    ids_TA = logits_TE.new_empty((num_tokens, num_experts_per_token), dtype=torch.int32)
    weights_TA = torch.empty_like(ids_TA, dtype=torch.float32)
    arguments: list[Argument] = [logits_TE, correction_bias_E, ids_TA, weights_TA, num_tokens, num_experts]
    arguments += [num_experts_per_token, float(norm_min)]
    if num_tokens:
        grid = -(-num_tokens // _WARPS), 1
        device.launch(route_variant(num_experts), "route", grid, 32 * _WARPS, 0, arguments)
    return ids_TA, weights_TA


def route_variant(num_experts: int) -> Variant:
    """The kernel for that many experts: each lane of a warp holds 2, 4, 8 or 16 of them."""
    if num_experts > 512:
        raise ValueError(f"num_experts: the kernel takes at most 512, got {num_experts}")
    return Variant("route", (("PER_LANE", next(n for n in (2, 4, 8, 16) if num_experts <= 32 * n)),))
