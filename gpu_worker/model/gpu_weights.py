"""Stored weights in the forms that a GPU's kernels stream: what is quantized stays so, on the device.

    stored     dense layers         experts
    wint2      (decoded)            PackedWint2
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
from cuda_kernels.tiled import TiledWeight, pack_tiled, stack_tiled
from gpu_worker.model.plan import MLPPlan
from gpu_worker.model.stored_weight import StoredLinear

_INPUT_MULTIPLE = 8  # of what the tiled kernel reads at a time


def can_stream(stored: StoredLinear) -> bool:
    """Whether the kernels take a dense layer's weight as it is stored."""
    return stored.format in ("wint4", "wint8") and _is_whole(stored)


def can_stream_experts(experts: Sequence[MLPPlan]) -> bool:
    projections = [projection for expert in experts for projection in (expert.up_gate, expert.down)]
    formats = {p.format for p in projections}
    return len(formats) == 1 and "wint2t" not in formats and all(map(_is_whole, projections))


def stream_linear(stored: StoredLinear, *, is_gated: bool = False) -> TiledWeight:
    """A dense layer's weight; `can_stream` it."""
    tensors = stored.read()
    levels, scale = tensors["quant_weight"].view(torch.int8), tensors["weight_scale"]
    if stored.format == "wint4":
        weight_NK = wint4.unpack(levels)[: stored.num_inputs].T
        return pack_tiled(weight_NK, scale, bits=4, is_gated=is_gated)
    weight_NK = wint8.unpack(levels)[: stored.num_inputs].T
    return pack_tiled(weight_NK, scale, bits=8, is_gated=is_gated)


def stream_experts(
    experts: Sequence[MLPPlan], k_order: KOrder, read: Callable[[StoredLinear], None]
) -> StreamedExperts:
    """A layer's experts; `read` is told of every projection that was read."""
    projections = [expert.up_gate for expert in experts], [expert.down for expert in experts]
    pack = _pack_wint2 if experts[0].up_gate.format == "wint2" else _tile
    up_gate, down = (
        pack(stored, k_order, is_gated) for stored, is_gated in zip(projections, (True, False), strict=True)
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # packing's scratch: the next layer's pieces may be of other sizes
    for stored in (*projections[0], *projections[1]):
        read(stored)
    return StreamedExperts(up_gate, down)


def _is_whole(stored: StoredLinear) -> bool:
    """With one set of scales, or none."""
    return (stored.format == "none" or stored.is_one_weight) and stored.num_inputs % _INPUT_MULTIPLE == 0


def _pack_wint2(experts: Sequence[StoredLinear], k_order: KOrder, is_gated: bool) -> PackedWint2:
    read = [stored.read() for stored in experts]
    tensors: dict[str, Tensor] = {}
    for name in ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp"):
        tensors[name] = torch.stack([one.pop(name) for one in read])
    return pack_wint2(**tensors, is_gated=is_gated, k_order=k_order)


def _tile(experts: Sequence[StoredLinear], k_order: KOrder, is_gated: bool) -> TiledWeight:
    if experts[0].format != "none":
        return stack_tiled([stream_linear(stored, is_gated=is_gated) for stored in experts])
    return stack_tiled(
        [pack_tiled(stored.dense().bfloat16(), bits=16, is_gated=is_gated) for stored in experts]
    )
