"""What a model will take, from config.json alone: weights by kind, KV cache, the context that fits.

memory of a GPU x utilization
- weights               replicated ones, and the rank's share of the others
- reserve               CUDA itself, CUDA graphs, a step's activations
= KV cache              cut by key-value heads over the ranks
"""

from __future__ import annotations

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
DEGREES = (1, 2, 4, 8)
_REPLICATED = frozenset(("embedding", "head", "norms", "router"))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of weights by (kind, format), and of the KV cache by token."""

    weights: Counter[tuple[str, str]]
    token_bytes: int
    max_position_embeddings: int
    num_key_value_heads: int

    @property
    def weight_bytes(self) -> int:
        return self.weights.total()

    def rank_bytes(self, degree: int) -> int:
        """Weights of one of `degree` ranks."""
        return sum(
            size if kind in _REPLICATED else -(-size // degree) for (kind, _), size in self.weights.items()
        )

    def largest_model_len(self, device_bytes: int, degree: int = 1) -> int:
        """The longest context that fits beside the weights; 0 if none does."""
        left = device_bytes - self.rank_bytes(degree) - RESERVED_BYTES
        return max(0, min(self.max_position_embeddings, left * degree // self.token_bytes))

    def lines(self) -> Iterator[str]:
        """The memory table."""
        for (kind, form), size in sorted(self.weights.items(), key=lambda item: -item[1]):
            name = "full precision" if form == "none" else form
            yield f"{kind:<15} {name:<15} {size / 1e9:9.2f} GB {size / GIB:9.2f} GiB"
        yield f"{'weights':<31} {self.weight_bytes / 1e9:9.2f} GB {self.weight_bytes / GIB:9.2f} GiB"
        context = self.token_bytes * self.max_position_embeddings
        yield f"{'KV cache':<15} {self.token_bytes / 1024:.4g} KiB a token, {context / GIB:.2f} GiB for " + (
            f"{self.max_position_embeddings} tokens"
        )


def footprint(config: ModelConfig, cache_dtype: torch.dtype = torch.bfloat16) -> Footprint:
    weights: Counter[tuple[str, str]] = Counter()
    for weight in plan_dummy(config).weights():
        weights[weight.kind, weight.format] += weight.stored_bytes
    token_bytes = kv_block_bytes(config, 1, cache_dtype)
    return Footprint(weights, token_bytes, config.max_position_embeddings, config.num_key_value_heads)


def fits(found: Footprint, utilization: float = 0.9) -> Iterator[str]:
    """For GPUs of common sizes, the fewest that hold the model, and the context that then fits."""
    degrees = [degree for degree in DEGREES if found.num_key_value_heads % degree == 0]
    for size in GPU_SIZES_GIB:
        lengths = ((d, found.largest_model_len(int(size * GIB * utilization), d)) for d in degrees)
        fitting = next(((degree, length) for degree, length in lengths if length), None)
        if fitting is None:
            yield f"GPUs of {size} GiB: more than {degrees[-1]} are needed"
        else:
            yield f"GPUs of {size} GiB: {fitting[0]}, context up to {fitting[1]} tokens"


def check_weights_fit(config: ModelConfig, choice: DeviceChoice, utilization: float) -> None:
    """Raises EngineArgsError, with numbers and the remedy, before anything of a hopeless model is read."""
    found = footprint(config)
    if choice.device.type == "cpu":
        limit, where = available_cpu_bytes(), "of memory are available"
        remedy = "use a machine with more"
    else:
        total = torch.cuda.get_device_properties(choice.device).total_memory
        limit, where = int(total * utilization), f"of this GPU's {total / GIB:.1f} may be used"
        remedy = next(iter(_remedies(found, total, utilization)))
    if found.weight_bytes > limit:
        raise EngineArgsError(
            "model",
            f"{config.path}: the weights need {found.weight_bytes / GIB:.1f} GiB, {limit / GIB:.1f} {where}: "
            f"{remedy}",
        )


def _remedies(found: Footprint, total: int, utilization: float) -> Iterator[str]:
    limit = int(total * utilization)
    for degree in DEGREES[1:]:
        if found.num_key_value_heads % degree == 0 and found.largest_model_len(limit, degree):
            yield f"use {degree} such GPUs, --tensor-parallel-size {degree}, or a larger one"
    yield "use a larger GPU"
