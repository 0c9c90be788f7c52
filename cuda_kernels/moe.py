"""Op `moe_ffn`: the routed experts' SwiGLU feed-forward networks.

    y_t = sum over a of weight[t, a] · down_e( silu(gate_e(x_t)) · up_e(x_t) ),  e = ids[t, a]

Shapes: T tokens, D hidden, E experts, A activated experts per token, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cuda_kernels.compiled import cpu
from cuda_kernels.cpu.panels import PanelExperts
from cuda_kernels.linear import DenseWeight, linear, pack_dense
from cuda_kernels.moe_wint2 import moe_wint2
from cuda_kernels.packing import PackedWint2
from cuda_kernels.tiled import TiledWeight
from cuda_kernels.tiled_linear import moe_tiled


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Every expert's up_gate [2F, D] (gate rows first) and down [D, F] projection.

    When every token activates every expert, the experts are one wide network whose hidden features are scaled
    by the expert's weight: the tuples then hold one weight each, up_gate [2·E·F, D] (all gates first) and
    down [D, E·F].
    """

    up_gate: tuple[DenseWeight, ...]
    down: tuple[DenseWeight, ...]
    num_experts: int
    is_merged: bool

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in (*self.up_gate, *self.down))


@dataclass(frozen=True, eq=False, slots=True)
class StreamedExperts:
    """All experts' up_gate and down in a form whose kernel routes by itself, on a GPU."""

    up_gate: PackedWint2 | TiledWeight
    down: PackedWint2 | TiledWeight

    @property
    def nbytes(self) -> int:
        return self.up_gate.nbytes + self.down.nbytes


def pack_experts(
    experts: Iterable[tuple[torch.Tensor, torch.Tensor]], num_experts: int, num_experts_per_token: int
) -> ExpertWeights:
    """Lay out the experts' (up_gate [2F, D], down [D, F]) for `moe_ffn`, taking them one by one."""
    if num_experts_per_token == num_experts:
        up_gates, downs = zip(*experts, strict=True)
        gates, ups = zip(*(up_gate.chunk(2) for up_gate in up_gates), strict=True)
        merged = pack_dense(torch.cat((*gates, *ups))), pack_dense(torch.cat(downs, dim=1))
        return ExpertWeights((merged[0],), (merged[1],), num_experts, is_merged=True)
    packed = [(pack_dense(up_gate), pack_dense(down)) for up_gate, down in experts]
    up_gate_E, down_E = zip(*packed, strict=True)
    return ExpertWeights(up_gate_E, down_E, num_experts, is_merged=False)


def moe_ffn(
    hidden_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    expert_weights_TA: torch.Tensor,
    experts: ExpertWeights | StreamedExperts | PanelExperts,
) -> torch.Tensor:
    """The weighted sum of each token's experts: [T, D] in the hidden state's dtype.

    `expert_ids_TA` int32, a row without repetitions; `expert_weights_TA` float32.
    """
    if isinstance(experts, PanelExperts):
        return cpu.experts(hidden_TD, experts, expert_ids_TA, expert_weights_TA)
    if isinstance(experts, StreamedExperts):
        return _moe_ffn_streamed(hidden_TD, expert_ids_TA, expert_weights_TA, experts)
    if experts.is_merged:
        return _moe_ffn_merged(hidden_TD, expert_ids_TA, expert_weights_TA, experts)
    if hidden_TD.is_cuda:
        return _moe_ffn_everywhere(hidden_TD, expert_ids_TA, expert_weights_TA, experts)
    return _moe_ffn_by_expert(hidden_TD, expert_ids_TA, expert_weights_TA, experts)


def swiglu_ffn(hidden_TD: torch.Tensor, network: PanelExperts) -> torch.Tensor:
    """down(silu(gate(x)) · up(x)) of the one network there is: [T, D]."""
    return cpu.experts(hidden_TD, network)


def silu_and_mul(up_gate_TF: torch.Tensor) -> torch.Tensor:
    """SwiGLU of [T, 2F], gate half first: [T, F]."""
    gate_TF, up_TF = up_gate_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def _moe_ffn_streamed(
    hidden_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    expert_weights_TA: torch.Tensor,
    experts: StreamedExperts,
) -> torch.Tensor:
    match experts.up_gate, experts.down:
        case PackedWint2() as up_gate, PackedWint2() as down:
            return moe_wint2(hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)
        case TiledWeight() as up_gate, TiledWeight() as down:
            return moe_tiled(hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)
    raise TypeError("moe_ffn: up_gate and down are of different forms")


def _moe_ffn_everywhere(
    hidden_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    expert_weights_TA: torch.Tensor,
    experts: ExpertWeights,
) -> torch.Tensor:
    """Every expert on every token, with weight zero where it was not chosen: never waits for the device."""
    sum_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for expert, (up_gate, down) in enumerate(zip(experts.up_gate, experts.down, strict=True)):
        weight_T1 = torch.where(expert_ids_TA == expert, expert_weights_TA, 0.0).sum(1, keepdim=True)
        sum_TD += weight_T1 * linear(silu_and_mul(linear(hidden_TD, up_gate)), down)
    return sum_TD.to(hidden_TD.dtype)


def _moe_ffn_merged(
    hidden_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    expert_weights_TA: torch.Tensor,
    experts: ExpertWeights,
) -> torch.Tensor:
    weights_TE = torch.empty_like(expert_weights_TA).scatter_(1, expert_ids_TA.long(), expert_weights_TA)
    inner_TEF = silu_and_mul(linear(hidden_TD, experts.up_gate[0])).unflatten(-1, (experts.num_experts, -1))
    scaled_TEF = (inner_TEF * weights_TE.unsqueeze(-1)).to(hidden_TD.dtype)
    return linear(scaled_TEF.flatten(1), experts.down[0])


def _moe_ffn_by_expert(
    hidden_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    expert_weights_TA: torch.Tensor,
    experts: ExpertWeights,
) -> torch.Tensor:
    num_tokens, num_activated = expert_ids_TA.shape
    results_RD = hidden_TD.new_empty(num_tokens * num_activated, hidden_TD.shape[1])
    expert_R = expert_ids_TA.flatten()
    counts = torch.bincount(expert_R, minlength=experts.num_experts).tolist()
    rows_by_expert = torch.argsort(expert_R, stable=True).split(counts)
    for rows, up_gate, down in zip(rows_by_expert, experts.up_gate, experts.down, strict=True):
        if rows.numel():
            inner = silu_and_mul(linear(hidden_TD[rows // num_activated], up_gate))
            results_RD[rows] = linear(inner, down)
    results_TAD = results_RD.view(num_tokens, num_activated, hidden_TD.shape[1]).float()
    return (results_TAD * expert_weights_TA.unsqueeze(-1)).sum(1).to(hidden_TD.dtype)
