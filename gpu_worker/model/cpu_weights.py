"""Stored weights in the forms that the CPU's kernels decode as they multiply: what is quantized stays so.

    stored                  panels
    wint8, wint4, wint2     as stored: level · scale counts exactly, never rounded to bfloat16
    bfloat16, float32       as stored
    float16                 float32
    ranks of a checkpoint   bfloat16, decoded: every rank has scales of its own

With activations of int8 the integers of a weight are multiplied with x in 8 bits, and a bfloat16 head, which
takes most of the memory that a token reads, is rounded to WINT8.
Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels.compiled import cpu
from cuda_kernels.cpu.panels import (
    NARROW,
    Activations,
    PanelExpert,
    PanelExperts,
    PanelWeight,
    pack_dense,
    pack_narrow,
    pack_wint2,
    pack_wint4,
    pack_wint8,
    settle,
    stack_experts,
)
from cuda_kernels.formats import wint4, wint8
from cuda_kernels.formats.layout import GROUP_SIZE, KOrder
from cuda_kernels.formats.wint2 import Wint2Weight
from cuda_kernels.formats.wint4 import Wint4Weight
from cuda_kernels.formats.wint8 import Wint8Weight
from gpu_worker.model.plan import MLPPlan
from gpu_worker.model.stored_weight import StoredLinear


def has_panels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model's weights become panels: the kernels compute in float32."""
    return cpu is not None and device.type == "cpu" and dtype == torch.float32


def panel_linear(stored: StoredLinear, k_order: KOrder, activations: Activations = "float32") -> PanelWeight:
    """A dense layer's weight. WINT2 and WINT4 are the experts' formats, and are decoded here."""
    if stored.format == "wint8" and stored.is_one_weight:
        return settle(_with(activations, _quantized(stored, slice(None))))
    weight_NK = stored.dense(k_order)
    if weight_NK.dtype == torch.float32 and len(weight_NK) <= NARROW:
        return settle(_with("float32", pack_narrow(weight_NK)))
    return settle(panel_dense(weight_NK))


def panel_dense(weight_NK: Tensor) -> PanelWeight:
    packed = pack_dense(weight_NK.float() if weight_NK.dtype == torch.float16 else weight_NK)
    return _with("float32", packed)


def panel_head(weight_VD: Tensor, activations: Activations) -> PanelWeight:
    """A head of floats."""
    if activations == "float32":
        return settle(panel_dense(weight_VD))
    weight_DV = F.pad(weight_VD.T, (0, 0, 0, -weight_VD.shape[1] % GROUP_SIZE))
    return settle(_with(activations, pack_wint8(wint8.quantize(weight_DV), weight_VD.shape[1])))


def panel_experts(
    experts: Sequence[MLPPlan], k_order: KOrder, activations: Activations = "float32"
) -> PanelExperts:
    """A layer's experts, or the one network of a dense layer."""
    return stack_experts([_expert(expert, k_order, activations) for expert in experts], k_order)


def _with(activations: Activations, weight: PanelWeight) -> PanelWeight:
    """The weight, whose kernel is compiled by now: no request waits for that."""
    weight = replace(weight, activations=activations)
    cpu.compile_kernel(weight)
    return weight


def _expert(expert: MLPPlan, k_order: KOrder, activations: Activations) -> PanelExpert:
    half = expert.up_gate.num_outputs // 2
    is_one_weight = expert.up_gate.is_one_weight and expert.down.is_one_weight
    if expert.up_gate.format in ("none", "wint2t") or not is_one_weight:
        gate, up = (panel_dense(part) for part in expert.up_gate.dense(k_order).split(half))
        return PanelExpert(gate, up, panel_dense(expert.down.dense(k_order)))
    parts = (expert.up_gate, slice(half)), (expert.up_gate, slice(half, None)), (expert.down, slice(None))
    return PanelExpert(*(_with(activations, _quantized(*part)) for part in parts))


def _quantized(stored: StoredLinear, columns: slice) -> PanelWeight:
    tensors, num_inputs = stored.read(), stored.num_inputs
    if stored.format == "wint2":
        parts = {name: tensor[..., columns] for name, tensor in tensors.items()}
        return pack_wint2(Wint2Weight(**parts), num_inputs)
    levels, scale = tensors["quant_weight"].view(torch.int8), tensors["weight_scale"][columns]
    if stored.format == "wint4":
        return pack_wint4(Wint4Weight(wint4.unpack(levels)[:, columns], scale), num_inputs)
    return pack_wint8(Wint8Weight(wint8.unpack(levels)[:, columns], scale), num_inputs)
