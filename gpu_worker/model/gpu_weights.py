"""Stored weights in the forms that a GPU's kernels stream: what is quantized stays so, on the device.

    stored     dense layers         experts
    wint2      (decoded)            PackedWint2
    wint2t     (decoded)            TiledWeight, 2 bits
    wint4      TiledWeight, 4 bits  TiledWeight, 4 bits
    wint8      TiledWeight, 8 bits  TiledWeight, 8 bits
    bfloat16   plain                TiledWeight, 16 bits

Shapes: N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cuda_kernels.formats import wint4, wint8
from cuda_kernels.formats.layout import KOrder
from cuda_kernels.moe import StreamedExperts
from cuda_kernels.packing import PackedWint2, pack_wint2
from cuda_kernels.tiled import TiledWeight, pack_tiled, pack_trellis, stack_tiled
from gpu_worker.model.plan import MLPPlan
from gpu_worker.model.scratch import apart
from gpu_worker.model.stored_weight import StoredLinear

_INPUT_MULTIPLE = 8  # of what the tiled kernel reads at a time


def can_stream(stored: StoredLinear) -> bool:
    """Whether the kernels take a dense layer's weight as it is stored."""
    return stored.format in ("wint4", "wint8") and _is_whole(stored)


def can_stream_experts(experts: Sequence[MLPPlan]) -> bool:
    projections = [projection for expert in experts for projection in (expert.up_gate, expert.down)]
    formats = {p.format for p in projections}
    return len(formats) == 1 and all(map(_is_whole, projections))


def stream_linear(stored: StoredLinear, *, is_gated: bool = False) -> TiledWeight:
    """A dense layer's weight; `can_stream` it."""
    return apart(lambda: _tiled(stored, is_gated))


def stream_experts(
    experts: Sequence[MLPPlan], k_order: KOrder, read: Callable[[StoredLinear], None]
) -> StreamedExperts:
    """A layer's experts; `read` is told of every projection that was read."""
    up_gates, downs = [expert.up_gate for expert in experts], [expert.down for expert in experts]
    if experts[0].up_gate.format == "wint2":
        streamed = StreamedExperts(
            apart(lambda: _packed(up_gates, k_order, is_gated=True)),
            apart(lambda: _packed(downs, k_order, is_gated=False)),
        )
    else:
        streamed = StreamedExperts(
            apart(lambda: _stacked(up_gates, is_gated=True)), apart(lambda: _stacked(downs, is_gated=False))
        )
    for stored in (*up_gates, *downs):
        read(stored)
    return streamed


def _tiled(stored: StoredLinear, is_gated: bool) -> TiledWeight:
    tensors = stored.read()
    if stored.format == "wint2t":
        super_scales = tensors.pop("super_scales").to(torch.bfloat16)
        return pack_trellis(
            **tensors, super_scales=super_scales, num_inputs=stored.num_inputs, is_gated=is_gated
        )
    levels, scale = tensors["quant_weight"].view(torch.int8), tensors["weight_scale"]
    if stored.format == "wint4":
        weight_NK = wint4.unpack(levels)[: stored.num_inputs].T
        return pack_tiled(weight_NK, scale, bits=4, is_gated=is_gated)
    weight_NK = wint8.unpack(levels)[: stored.num_inputs].T
    return pack_tiled(weight_NK, scale, bits=8, is_gated=is_gated)


def _is_whole(stored: StoredLinear) -> bool:
    """With one set of scales, or none."""
    return (stored.format == "none" or stored.is_one_weight) and stored.num_inputs % _INPUT_MULTIPLE == 0


def _packed(experts: Sequence[StoredLinear], k_order: KOrder, *, is_gated: bool) -> PackedWint2:
    read = [stored.read() for stored in experts]
    tensors: dict[str, Tensor] = {}
    for name in ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp"):
        tensors[name] = torch.stack([one.pop(name) for one in read])
    return pack_wint2(**tensors, is_gated=is_gated, k_order=k_order)


def _stacked(experts: Sequence[StoredLinear], *, is_gated: bool) -> TiledWeight:
    if experts[0].format != "none":
        return stack_tiled([_tiled(stored, is_gated) for stored in experts])
    return stack_tiled(
        [pack_tiled(stored.dense().bfloat16(), bits=16, is_gated=is_gated) for stored in experts]
    )
