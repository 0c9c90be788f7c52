"""What a model will take, from config.json alone: weights by kind, KV cache, the context that fits.

memory of a GPU x utilization
- weights               replicated ones, and the rank's share of the others
- reserve               CUDA itself, CUDA graphs, a step's activations
= KV cache              cut by key-value heads over the ranks
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_worker.config import ModelConfig
from gpu_worker.engine.devices import DeviceChoice
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.memory import GIB, available_cpu_bytes, kv_block_bytes
from gpu_worker.model.dummy import plan_dummy

RESERVED_BYTES = 2 * GIB
GPU_SIZES_GIB = (24, 48, 80, 141)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of weights by (kind, format), and of the KV cache by token."""

    weights: Counter[tuple[str, str]]
    cache_dtype: torch.dtype
    token_bytes: int
    max_position_embeddings: int

    @property
    def weight_bytes(self) -> int:
        return self.weights.total()

    def largest_model_len(self, device_bytes: int) -> int:
        """The longest context that fits beside the weights; 0 if none does."""
        left = device_bytes - self.weight_bytes - RESERVED_BYTES
        return max(0, min(self.max_position_embeddings, left // self.token_bytes))

    def smallest_gpu_gib(self, utilization: float) -> int:
        """What a GPU must have to serve at all."""
        return math.ceil((self.weight_bytes + RESERVED_BYTES + self.token_bytes) / utilization / GIB)

    def lines(self) -> Iterator[str]:
        """The memory table."""
        for (kind, form), size in sorted(self.weights.items(), key=lambda item: -item[1]):
            name = "full precision" if form == "none" else form
            yield f"{kind:<15} {name:<15} {size / 1e9:9.2f} GB {size / GIB:9.2f} GiB"
        yield f"{'weights':<31} {self.weight_bytes / 1e9:9.2f} GB {self.weight_bytes / GIB:9.2f} GiB"
        context = self.token_bytes * self.max_position_embeddings
        name = str(self.cache_dtype).removeprefix("torch.")
        yield (
            f"{'KV cache':<15} {name:<15} {self.token_bytes / 1024:.4g} KiB a token, "
            f"{context / GIB:.2f} GiB for {self.max_position_embeddings} tokens"
        )


def footprint(config: ModelConfig, cache_dtype: torch.dtype = torch.bfloat16) -> Footprint:
    weights: Counter[tuple[str, str]] = Counter()
    for weight in plan_dummy(config).weights():
        weights[weight.kind, weight.format] += weight.stored_bytes
    token_bytes = kv_block_bytes(config, 1, cache_dtype)
    return Footprint(weights, cache_dtype, token_bytes, config.max_position_embeddings)


def fits(found: Footprint, utilization: float = 0.9) -> Iterator[str]:
    """For GPUs of common sizes, the context that fits."""
    for size in GPU_SIZES_GIB:
        length = found.largest_model_len(int(size * GIB * utilization))
        fitting = f"context up to {length} tokens" if length else "too small"
        yield f"GPU of {size} GiB: {fitting}"
    yield f"smallest GPU: {found.smallest_gpu_gib(utilization)} GiB"


def check_weights_fit(config: ModelConfig, choice: DeviceChoice, utilization: float) -> None:
    """Raises EngineArgsError, with numbers and the remedy, before anything of a hopeless model is read."""
    found = footprint(config)
    if choice.device.type == "cpu":
        limit, where = available_cpu_bytes(), "of memory are available"
        remedy = "use a machine with more"
    else:
        total = torch.cuda.get_device_properties(choice.device).total_memory
        limit, where = int(total * utilization), f"of this GPU's {total / GIB:.1f} may be used"
        remedy = f"use one with at least {found.smallest_gpu_gib(utilization)} GiB"
    if found.weight_bytes > limit:
        raise EngineArgsError(
            "model",
            f"{config.path}: the weights need {found.weight_bytes / GIB:.1f} GiB, {limit / GIB:.1f} {where}: "
            f"{remedy}",
        )
