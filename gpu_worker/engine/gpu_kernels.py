"""Builds the GPU kernels that a model will launch, before it launches the first: all at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch

from cuda_kernels import attention_kernels, tiled_linear
from cuda_kernels.build import Variant, device_arch, warm_up
from cuda_kernels.moe import StreamedExperts
from cuda_kernels.moe_wint2 import moe_wint2_variants
from cuda_kernels.packing import PackedWint2
from cuda_kernels.routing import route_variant
from cuda_kernels.tiled import Bits, TiledWeight
from gpu_worker.layers.linear import Linear, SwiGLU
from gpu_worker.layers.moe import MoE
from gpu_worker.model.decoder import Decoder, DecoderLayer

logger = logging.getLogger(__name__)


def build_kernels(model: Decoder, device: torch.device, cache_dtype: torch.dtype) -> None:
    """Compiles what the cache on disk lacks; nothing on a CPU."""
    if device.type != "cuda":
        return
    start = time.monotonic()
    arch = device_arch(torch.cuda.get_device_capability(device))
    wanted = list(dict.fromkeys(kernels_of(model, cache_dtype, arch)))
    warm_up(wanted, arch, _log_progress)
    logger.info("%d kernels are ready, after %.1f s", len(wanted), time.monotonic() - start)


def kernels_of(model: Decoder, cache_dtype: torch.dtype, arch: str) -> Iterator[Variant]:
    """Every kernel that a step of this model may launch."""
    yield from (Variant(stem) for stem in ("norm", "rope", "kv_store", "sampling"))
    yield from attention_kernels.variants(model.config.head_dim, cache_dtype, is_hopper=arch == "sm_90a")
    weights = [weight for layer in model.layers for weight in _weights(layer)]
    bits: set[Bits] = {weight.bits for weight in weights if isinstance(weight, TiledWeight)}
    for width in sorted(bits):
        yield from tiled_linear.variants(width)
    if any(isinstance(layer.mlp, MoE) for layer in model.layers):
        yield Variant("routing")
        yield route_variant(model.config.num_experts)
    if any(isinstance(weight, PackedWint2) for weight in weights):
        yield from moe_wint2_variants()


def _weights(layer: DecoderLayer) -> Iterator[object]:
    yield layer.attention.qkv_proj.weight
    yield layer.attention.o_proj.weight
    yield from _mlp_weights(layer.mlp)


def _mlp_weights(mlp: object) -> Iterator[object]:
    match mlp:
        case Linear():
            yield mlp.weight
        case SwiGLU() | StreamedExperts():
            yield from (_plain(mlp.up_gate), _plain(mlp.down))
        case MoE():
            yield from _mlp_weights(mlp.experts)
            yield from _mlp_weights(mlp.shared)


def _plain(projection: object) -> object:
    return projection.weight if isinstance(projection, Linear) else projection


def _log_progress(done: int, total: int, variant: Variant) -> None:
    if done == total or done % 10 == 0:
        logger.info("kernels: %d of %d built, the last %s", done, total, variant)
