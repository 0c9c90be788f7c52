"""What a model will take, from config.json alone: weights by kind, KV cache, the context that fits.

memory of a GPU x utilization
- weights               replicated ones, and the rank's share of the others
- reserve               CUDA itself, CUDA graphs, a step's activations
= KV cache              cut by key-value heads over the ranks
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from gpu_worker.config import ModelConfig
from gpu_worker.engine.devices import DeviceChoice
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.memory import GIB, available_cpu_bytes, kv_block_bytes
from gpu_worker.layers.ranks import Ranks
from gpu_worker.model.dummy import plan_dummy
from gpu_worker.model.sharding import degree_problem, shard_config, shard_plan

RESERVED_BYTES = 2 * GIB
GPU_SIZES_GIB = (24, 48, 80, 141)
DEGREES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of weights by (kind, format), and of the KV cache by token, on one rank."""

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


def footprint(
    config: ModelConfig, cache_dtype: torch.dtype = torch.bfloat16, num_ranks: int = 1
) -> Footprint:
    weights: Counter[tuple[str, str]] = Counter()
    ranks = Ranks(0, num_ranks)
    plan = plan_dummy(config)
    for weight in (plan if num_ranks == 1 else shard_plan(plan, config, ranks)).weights():
        weights[weight.kind, weight.format] += weight.stored_bytes
    token_bytes = kv_block_bytes(shard_config(config, ranks), 1, cache_dtype)
    return Footprint(weights, cache_dtype, token_bytes, config.max_position_embeddings)


def footprints(config: ModelConfig, cache_dtype: torch.dtype = torch.bfloat16) -> dict[int, Footprint]:
    """By the number of ranks, of those that can share the model."""
    degrees = [size for size in (1, *DEGREES) if degree_problem(config, size) is None]
    return {size: footprint(config, cache_dtype, size) for size in degrees}


def fits(found: Mapping[int, Footprint], utilization: float = 0.9) -> Iterator[str]:
    """For GPUs of common sizes, the context that fits on one, or on the fewest that can serve."""
    for gib in GPU_SIZES_GIB:
        lengths = {
            degree: one.largest_model_len(int(gib * GIB * utilization)) for degree, one in found.items()
        }
        enough = next((degree for degree, length in lengths.items() if length), None)
        yield f"GPU of {gib} GiB: " + (
            "too small"
            if enough is None
            else f"context up to {lengths[1]} tokens"
            if enough == 1
            else f"too small; --tensor-parallel-size {enough}: context up to {lengths[enough]} tokens"
        )
    yield f"smallest GPU: {found[1].smallest_gpu_gib(utilization)} GiB"


def check_weights_fit(
    config: ModelConfig, choice: DeviceChoice, utilization: float, num_ranks: int = 1
) -> None:
    """Raises EngineArgsError, with numbers and the remedy, before anything of a hopeless model is read."""
    found = footprint(config, num_ranks=num_ranks)
    if choice.device.type == "cpu":
        needed, limit = found.weight_bytes * num_ranks, available_cpu_bytes()
        where, remedy = "of memory are available", "use a machine with more"
    else:
        total = torch.cuda.get_device_properties(choice.device).total_memory
        needed, limit = found.weight_bytes, int(total * utilization)
        where = f"of this GPU's {total / GIB:.1f} may be used"
        remedy = _remedy(config, limit, num_ranks, utilization)
    if needed > limit:
        each = f" on each of {num_ranks} ranks" if num_ranks > 1 and choice.device.type != "cpu" else ""
        raise EngineArgsError(
            "model",
            f"{config.path}: the weights need {needed / GIB:.1f} GiB{each}, {limit / GIB:.1f} {where}: "
            f"{remedy}",
        )


def _remedy(config: ModelConfig, limit_bytes: int, num_ranks: int, utilization: float) -> str:
    """More GPUs of this size, where they would do; or a larger one."""
    found = footprints(config)
    for degree, one in found.items():
        if degree > num_ranks and one.largest_model_len(limit_bytes):
            return f"use --tensor-parallel-size {degree}"
    return f"use one with at least {found[1].smallest_gpu_gib(utilization)} GiB"
