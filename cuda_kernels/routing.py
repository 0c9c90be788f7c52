"""Op `route`: which experts a token goes to, and with what weights.

    p = softmax(logits)                      float32
    ids = top-k of p + correction bias       the bias takes part in the choice only; ties: lower id first
    weights = p[ids] / max(sum p[ids], norm_min)

as ERNIE 4.5 routes (Hugging Face's Ernie4_5_MoeTopKRouter).
Shapes: T tokens, E experts, A activated experts per token.
"""

from __future__ import annotations

from functools import cache

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu
from cuda_kernels.cpu.panels import PanelWeight
from cuda_kernels.launch import Argument, Device, check, cuda_device
from cuda_kernels.linear import DenseWeight, linear
from cuda_kernels.tiled import TiledWeight

_WARPS = 4  # as in csrc/route.cu
_FEW, _SEVERAL = (1, 4), (4, 8)  # experts and tokens of a router's block, as in csrc/route.cu
_ROUTER_THREADS = 256
_MAX_ROUTER_TOKENS = 128  # for more the matrix library's product is faster


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


def choose_experts(
    hidden_TD: torch.Tensor,
    router: DenseWeight | TiledWeight | PanelWeight,
    correction_bias_E: torch.Tensor,
    num_experts_per_token: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` of the router's logits, hidden [T, D] times its float32 weight [E, D] transposed."""
    num_tokens, width = hidden_TD.shape
    is_small = hidden_TD.is_cuda and num_tokens <= _MAX_ROUTER_TOKENS and width % 8 == 0
    if isinstance(router, DenseWeight) and is_small and hidden_TD.dtype == torch.bfloat16:
        device = cuda_device(hidden_TD.device.index)
        return launch_router(
            device, hidden_TD, router.data, correction_bias_E, num_experts_per_token, norm_min
        )
    logits_TE = linear(hidden_TD.float(), router)
    return route(logits_TE, correction_bias_E, num_experts_per_token, norm_min)


def launch_router(
    device: Device,
    hidden_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    correction_bias_E: torch.Tensor,
    num_experts_per_token: int,
    norm_min: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by one kernel, for at most `_MAX_ROUTER_TOKENS` tokens."""
    (num_tokens, width), num_experts = hidden_TD.shape, weight_ED.shape[0]
    check("hidden_TD", hidden_TD, (num_tokens, width), (torch.bfloat16,))
    check("weight_ED", weight_ED, (num_experts, width), (torch.float32,))
    ids_TA, weights_TA = _choices(hidden_TD, num_experts_per_token)
    logits_TE = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=hidden_TD.device)
    arguments: list[Argument] = [hidden_TD, weight_ED, width // 8, logits_TE, _counters(hidden_TD.device)]
    arguments += [correction_bias_E, ids_TA, weights_TA, num_tokens, num_experts]
    arguments += [num_experts_per_token, float(norm_min)]
    if num_tokens:
        kernel, (experts, tokens) = ("router_of_few", _FEW) if num_tokens <= _FEW[1] else ("router", _SEVERAL)
        grid = -(-num_experts // experts), -(-num_tokens // tokens)
        shared_bytes = 4 * (experts * tokens * _ROUTER_THREADS // 32 + 1)
        variant = route_variant(num_experts)
        device.launch(variant, kernel, grid, _ROUTER_THREADS, shared_bytes, arguments, overlaps=True)
    return ids_TA, weights_TA


@cache
def _counters(where: torch.device) -> torch.Tensor:
    """Zeros, one for each group of tokens, which every launch leaves as zeros."""
    return torch.zeros(-(-_MAX_ROUTER_TOKENS // _SEVERAL[1]), dtype=torch.int32, device=where)


def _choices(like_T: torch.Tensor, num_experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for ids and weights [T, A]."""
    if num_experts_per_token > 32:
        raise ValueError(f"num_experts_per_token: the kernel chooses at most 32, got {num_experts_per_token}")
    ids_TA = like_T.new_empty((len(like_T), num_experts_per_token), dtype=torch.int32)
    return ids_TA, torch.empty_like(ids_TA, dtype=torch.float32)


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
    ids_TA, weights_TA = _choices(logits_TE, num_experts_per_token)
    arguments: list[Argument] = [logits_TE, correction_bias_E, ids_TA, weights_TA, num_tokens, num_experts]
    arguments += [num_experts_per_token, float(norm_min)]
    if num_tokens:
        grid = -(-num_tokens // _WARPS), 1
        device.launch(route_variant(num_experts), "route", grid, 32 * _WARPS, 0, arguments, overlaps=True)
    return ids_TA, weights_TA


def route_variant(num_experts: int) -> Variant:
    """The kernel for that many experts: each lane of a warp holds 2, 4, 8 or 16 of them."""
    if num_experts > 512:
        raise ValueError(f"num_experts: the kernel takes at most 512, got {num_experts}")
    return Variant("route", (("PER_LANE", next(n for n in (2, 4, 8, 16) if num_experts <= 32 * n)),))
