"""What a model will take, told before anything is read: weights by kind, KV cache, the context that fits.

memory of a GPU x utilization
- weights               replicated ones, and the rank's share of the others
- reserve               CUDA itself, a step's activations: an estimate, see reserve.py
= KV cache              cut by key-value heads over the ranks
CUDA graphs come out of what the utilization leaves free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from gpu_worker.config import ModelConfig, SchedulerConfig
from gpu_worker.engine.devices import DeviceChoice
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.memory import GIB, available_cpu_bytes, kv_block_bytes
from gpu_worker.engine.reserve import Reserve, estimate_reserve
from gpu_worker.layers.ranks import Ranks
from gpu_worker.model.dummy import plan_dummy
from gpu_worker.model.sharding import degree_problem, shard_config, shard_plan

GPU_SIZES_GIB = (24, 48, 80, 141)
DEGREES = (2, 4, 8)
DEFAULT_LIMITS = SchedulerConfig()


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of weights by (kind, format), of the KV cache by token, and of all else, on one rank."""

    weights: Counter[tuple[str, str]]
    cache_dtype: torch.dtype
    token_bytes: int
    max_position_embeddings: int
    reserve: Reserve
    limits: SchedulerConfig

    @property
    def weight_bytes(self) -> int:
        return self.weights.total()

    @property
    def least_bytes(self) -> int:
        """What serving takes, the KV cache not counted."""
        return self.weight_bytes + self.reserve.total_bytes

    def largest_model_len(self, device_bytes: int) -> int:
        """The longest context that fits beside the rest; 0 if none does."""
        left = device_bytes - self.least_bytes
        return max(0, min(self.max_position_embeddings, left // self.token_bytes))

    def smallest_gpu_gib(self, utilization: float) -> int:
        """What a GPU must have to serve at all."""
        return math.ceil((self.least_bytes + self.token_bytes) / utilization / GIB)

    def lines(self) -> Iterator[str]:
        """The memory table of a GPU."""
        yield from self.model_lines()
        limits, reserve = self.limits, self.reserve
        yield _line("CUDA", "itself", reserve.cuda_bytes)
        yield _line("activations", f"{limits.max_num_batched_tokens} tokens", reserve.step_bytes)
        yield _line("CUDA graphs", "beside the rest", reserve.graph_bytes)

    def model_lines(self) -> Iterator[str]:
        """Of the weights and the KV cache, which every device must hold."""
        for (kind, form), size in sorted(self.weights.items(), key=lambda item: -item[1]):
            yield _line(kind, "full precision" if form == "none" else form, size)
        yield _line("weights", "", self.weight_bytes)
        context = self.token_bytes * self.max_position_embeddings
        name = str(self.cache_dtype).removeprefix("torch.")
        yield (
            f"{'KV cache':<15} {name:<15} {self.token_bytes / 1024:.4g} KiB a token, "
            f"{context / GIB:.2f} GiB for {self.max_position_embeddings} tokens"
        )


def footprint(
    config: ModelConfig,
    cache_dtype: torch.dtype = torch.bfloat16,
    num_ranks: int = 1,
    limits: SchedulerConfig = DEFAULT_LIMITS,
) -> Footprint:
    weights: Counter[tuple[str, str]] = Counter()
    ranks = Ranks(0, num_ranks)
    whole = plan_dummy(config)
    plan = whole if num_ranks == 1 else shard_plan(whole, config, ranks)
    for weight in plan.weights():
        weights[weight.kind, weight.format] += weight.stored_bytes
    token_bytes = kv_block_bytes(shard_config(config, ranks), 1, cache_dtype)
    reserve = estimate_reserve(plan, config, limits)
    return Footprint(weights, cache_dtype, token_bytes, config.max_position_embeddings, reserve, limits)


def footprints(
    config: ModelConfig,
    cache_dtype: torch.dtype = torch.bfloat16,
    limits: SchedulerConfig = DEFAULT_LIMITS,
) -> dict[int, Footprint]:
    """By the number of ranks, of those that can share the model."""
    degrees = [size for size in (1, *DEGREES) if degree_problem(config, size) is None]
    return {size: footprint(config, cache_dtype, size, limits) for size in degrees}


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


def check_fits(
    config: ModelConfig,
    choice: DeviceChoice,
    utilization: float,
    num_ranks: int = 1,
    *,
    cache_dtype: torch.dtype = torch.bfloat16,
    limits: SchedulerConfig = DEFAULT_LIMITS,
    wanted_len: int | None = None,
    cache_bytes: int | None = None,
) -> Iterator[str]:
    """The memory table for this machine, a line each. Raises EngineArgsError, with numbers and the remedy,
    before anything of a hopeless model is read.

    `limits` are those of a step; `wanted_len` and `cache_bytes` what was asked of the KV cache, if it was.
    """
    longest = config.max_position_embeddings
    if wanted_len is not None and wanted_len > longest:
        raise EngineArgsError("max_model_len", f"is {wanted_len}; the model was made for at most {longest}")
    found = footprint(config, cache_dtype, num_ranks, limits)
    if choice.device.type == "cpu":
        return _check_cpu(config, found, num_ranks)
    total = torch.cuda.get_device_properties(choice.device).total_memory
    limit = int(total * utilization)
    if found.least_bytes + max(found.token_bytes, cache_bytes or 0) > (total if cache_bytes else limit):
        raise EngineArgsError("model", _too_large(config, found, total, utilization, num_ranks, cache_bytes))
    length = found.largest_model_len(limit)
    # The reserve is an estimate: a context that only misses by less may be tried.
    certain = (limit - found.weight_bytes) // found.token_bytes
    if cache_bytes is None and wanted_len is not None and wanted_len > certain:
        raise EngineArgsError("max_model_len", _too_long(wanted_len, found, limit, num_ranks))
    return _gpu_lines(found, total, utilization, length)


def _gpu_lines(found: Footprint, total: int, utilization: float, length: int) -> Iterator[str]:
    limit = int(total * utilization)
    yield from found.lines()
    yield _line("headroom", "for the KV cache", limit - found.least_bytes)
    yield f"GPU of {total / GIB:.1f} GiB, {utilization:g} of it to be used: context up to {length} tokens"


def _check_cpu(config: ModelConfig, found: Footprint, num_ranks: int) -> Iterator[str]:
    needed, available = found.weight_bytes * num_ranks, available_cpu_bytes()
    if needed > available:
        raise EngineArgsError(
            "model",
            f"{config.path}: the weights need {needed / GIB:.1f} GiB, {available / GIB:.1f} of memory are "
            "available: use a machine with more",
        )
    return _cpu_lines(found, needed, available)


def _cpu_lines(found: Footprint, needed: int, available: int) -> Iterator[str]:
    yield from found.model_lines()
    length = min(found.max_position_embeddings, (available - needed) // found.token_bytes)
    yield _line("headroom", "", available - needed)
    yield f"memory available: {available / GIB:.1f} GiB; context up to {length} tokens"


def _too_large(
    config: ModelConfig,
    found: Footprint,
    total: int,
    utilization: float,
    num_ranks: int,
    cache_bytes: int | None,
) -> str:
    """ "needs 94 GiB, this GPU has 80: use --tensor-parallel-size 2", with what it is made of."""
    parts = [
        f"weights {found.weight_bytes / GIB:.1f}",
        f"CUDA {found.reserve.cuda_bytes / GIB:.1f}",
        f"a step of {found.limits.max_num_batched_tokens} tokens {found.reserve.step_bytes / GIB:.1f}",
    ]
    if cache_bytes:
        parts.append(f"the KV cache asked for {cache_bytes / GIB:.1f}")
    each = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
    usable = "" if cache_bytes else f", of which {utilization:g} may be used"
    remedy = _remedy(config, found, int(total * utilization), num_ranks, utilization)
    return (
        f"{config.path}: needs {(found.least_bytes + (cache_bytes or 0)) / GIB:.0f} GiB{each} "
        f"({', '.join(parts)}), this GPU has {total / GIB:.0f}{usable}: {remedy}"
    )


def _too_long(wanted_len: int, found: Footprint, limit: int, num_ranks: int) -> str:
    longest = found.largest_model_len(limit)
    more = "" if num_ranks > 1 else ", or share the model by --tensor-parallel-size"
    return (
        f"{wanted_len} tokens need {wanted_len * found.token_bytes / GIB:.1f} GiB of KV cache; beside "
        f"{found.least_bytes / GIB:.1f} GiB of weights and activations {limit / GIB:.1f} GiB hold "
        f"{longest} tokens: use --max-model-len {longest}{more}"
    )


def _remedy(config: ModelConfig, found: Footprint, limit: int, num_ranks: int, utilization: float) -> str:
    """More GPUs of this size, where they would do; or a larger one."""
    by_degree = footprints(config, found.cache_dtype, found.limits)
    for degree, one in by_degree.items():
        if degree > num_ranks and one.largest_model_len(limit):
            return f"use --tensor-parallel-size {degree}"
    return f"use one with at least {by_degree[1].smallest_gpu_gib(utilization)} GiB"


def _line(kind: str, name: str, size: int) -> str:
    return f"{kind:<15} {name:<15} {size / 1e9:9.2f} GB {size / GIB:9.2f} GiB"
