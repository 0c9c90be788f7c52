"""One decoder layer over calibration windows, its weights handed in one by one: how the quantizer sees
activations.

The engine's decoder holds a whole model and a KV cache; a 300B model on a 64 GB machine allows neither, and
its operators know no gradients, which tuning needs. Gradients do not pass through the choice of experts.
Shapes: S windows, T tokens each, D hidden, H query heads, G KV heads, C head dim, E experts, R rows (S·T).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from cuda_kernels.grouped_routing import route_grouped
from cuda_kernels.rope import cos_sin_table
from cuda_kernels.routing import route
from gpu_worker.config import ModelConfig

_LEAST_WEIGHT = 1e-3


@dataclass(frozen=True, eq=False)
class Routing:
    """Which rows each expert sees, and with what weight."""

    probabilities_RE: Tensor
    weights_RE: Tensor  # zero where the expert was not chosen

    @property
    def is_full(self) -> bool:
        """Every expert sees every row."""
        return bool((self.weights_RE > 0).all())

    def rows(self, expert: int, at_least: int) -> tuple[Tensor, Tensor]:
        """Numbers and weights of the rows to calibrate an expert on.

        An expert seen by fewer than `at_least` rows is lent those its router likes best, at the weight of
        that liking.
        """
        weights = self.weights_RE[:, expert]
        chosen = weights.nonzero().squeeze(1)
        wanted = min(at_least, len(weights))
        if len(chosen) >= wanted:
            return chosen, weights[chosen]
        liked = self.probabilities_RE[:, expert].clone()
        liked[chosen] += 1
        rows = liked.topk(wanted).indices
        lent = self.probabilities_RE[rows, expert].clamp(min=_LEAST_WEIGHT)
        return rows, torch.where(weights[rows] > 0, weights[rows], lent)


@dataclass(frozen=True, eq=False)
class AttentionExtras:
    """Parts that some families' attentions have: a bias [N] of q, k and v, norms of queries and keys."""

    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def normed(hidden: Tensor, norm_D: Tensor, config: ModelConfig) -> Tensor:
    """The normalized input of a block, float32."""
    return functional.rms_norm(hidden, norm_D.shape, norm_D.float(), config.rms_norm_eps)


def attention(
    x_STD: Tensor, qkv: Tensor, config: ModelConfig, extras: AttentionExtras = AttentionExtras()
) -> Tensor:
    """Causal attention before the output projection, [S, T, H·C]; `qkv` [D, (H+2G)·C]."""
    windows, length, _ = x_STD.shape
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projected = x_STD @ qkv if extras.qkv_bias is None else x_STD @ qkv + extras.qkv_bias
    fused = projected.float().view(windows, length, heads + 2 * kv_heads, size)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=2)
    if extras.q_norm is not None and extras.k_norm is not None:
        query, key = (_norm_heads(x, w, config) for x, w in ((query, extras.q_norm), (key, extras.k_norm)))
    table = _table(length, size, config.rope_theta, config.compression_ratio, x_STD.device)
    query, key = (_rotate(x, table) for x in (query, key))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(windows, length, heads * size)


@lru_cache(maxsize=4)
def _table(length: int, size: int, theta: float, ratio: float, device: torch.device) -> Tensor:
    """Cosines and sines of every position; not an inference tensor, which no gradient may meet later."""
    with torch.inference_mode(False):
        return cos_sin_table(length, size, theta, compression_ratio=ratio).to(device)


def _rotate(x_STHC: Tensor, table_TC: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs by a table of cosines and sines."""
    cos, sin = table_TC.unsqueeze(1).chunk(2, dim=-1)
    even, odd = x_STHC[..., 0::2], x_STHC[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _norm_heads(x_STHC: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """Heads by themselves, or all together, as the weight is wide."""
    rows = x_STHC.reshape(-1, weight.shape[0])
    return functional.rms_norm(rows, weight.shape, weight, config.rms_norm_eps).view(x_STHC.shape)


def swiglu(x: Tensor, up_gate: Tensor) -> Tensor:
    """silu(x·gate) ⊙ (x·up) for `up_gate` [D, 2F] = [gate | up]."""
    gate, up = (x @ up_gate).chunk(2, dim=-1)
    return functional.silu(gate) * up


def routing(x_RD: Tensor, router_DE: Tensor, bias_E: Tensor, config: ModelConfig) -> Routing:
    """Top-k routing of every row, in float32 whatever the rest computes in."""
    with torch.autocast(x_RD.device.type, enabled=False):
        logits = (x_RD.float() @ router_DE.float()).detach()
    grouped = config.grouped_routing
    if grouped is None:
        ids, weights = route(logits, bias_E, config.num_experts_per_token, config.norm_min)
    else:
        ids, weights = route_grouped(
            logits,
            bias_E,
            config.num_experts_per_token,
            grouped.num_groups,
            grouped.num_chosen_groups,
            grouped.is_normalized,
            grouped.scale,
        )
    dense = torch.zeros_like(logits).scatter_(1, ids.long(), weights)
    return Routing(logits.softmax(dim=-1), dense)
