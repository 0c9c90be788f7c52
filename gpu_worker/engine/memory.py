"""How much memory the KV cache may take, and how long a context then fits.

             CUDA                                               CPU
total x gpu_memory_utilization                         a quarter of the memory now available,
- what is in use (weights, CUDA itself)                but no more than 2 GiB or `max_num_seqs` sequences
- the largest step's activations, measured             of a thousand tokens, and then no less than one
                                                       of max_model_len; a group's ranks share it
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_kernels.cache_format import has_levels
from gpu_worker.config import ModelConfig
from gpu_worker.engine.devices import DTYPES
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.layers.kv_cache import KVCache

logger = logging.getLogger(__name__)

GIB = 2**30
CACHE_DTYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Tokens of a step by the memory of the device: so long that a prompt keeps it busy, so short that what a step
# computes on the way takes a small part of the memory.
_STEP_TOKENS = ((64 * GIB, 8192), (32 * GIB, 4096), (0, 2048))
_MAX_NUM_SEQS = 256

_CPU_SHARE = 0.25
_CPU_BYTES = 2 * GIB
_CPU_TOKENS_PER_SEQUENCE = 1024


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Blocks of the KV cache, and the longest context, in tokens."""

    num_blocks: int
    max_model_len: int


def choose_cache_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the KV cache holds; `wanted` is auto (as `dtype`, the activations'), or a name of CACHE_DTYPES."""
    if wanted == "auto":
        return dtype
    if wanted not in CACHE_DTYPES:
        choices = " or ".join(("auto", *CACHE_DTYPES))
        raise EngineArgsError("kv_cache_dtype", f"must be {choices}, got {wanted!r}")
    chosen = CACHE_DTYPES[wanted]
    fits_kernels = chosen == dtype or (dtype == torch.bfloat16 and has_levels(chosen))
    if device.type == "cuda" and not fits_kernels:
        name = str(dtype).removeprefix("torch.")
        raise EngineArgsError("kv_cache_dtype", f"{wanted} cannot be had on a GPU with dtype {name}")
    return chosen


def choose_limits(num_seqs: int | None, num_tokens: int | None, device: torch.device) -> tuple[int, int]:
    """Most sequences and most tokens of a step, of which one or both may be given."""
    if num_tokens is None:
        total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_cpu_bytes()
        num_tokens = max(num_seqs or 1, step_tokens(total))
    return num_seqs or min(_MAX_NUM_SEQS, num_tokens), num_tokens


def step_tokens(total_bytes: int) -> int:
    """Tokens of a step on a device with so much memory."""
    return next(num_tokens for least, num_tokens in _STEP_TOKENS if total_bytes >= least)


def kv_block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return KVCache.block_bytes(
        model.num_hidden_layers, block_size, model.num_key_value_heads, model.head_dim, dtype
    )


def available_cpu_bytes() -> int:
    """Memory that can be taken without swapping, also within a container's limit."""
    limits = [_proc_bytes(Path("/proc/meminfo"), "MemAvailable:")]
    cgroup = Path("/sys/fs/cgroup")
    maximum, current = cgroup / "memory.max", cgroup / "memory.current"
    if maximum.exists() and (text := maximum.read_text().strip()) != "max":
        limits.append(int(text) - int(current.read_text()))
    return max(0, min(limits))


def cpu_cache_bytes(max_num_seqs: int, token_bytes: int, max_model_len: int, num_ranks: int = 1) -> int:
    """What the cache of one rank takes when nobody says, in bytes."""
    enough = min(max_num_seqs * _CPU_TOKENS_PER_SEQUENCE * token_bytes, _CPU_BYTES // num_ranks)
    return min(max(enough, max_model_len * token_bytes), int(available_cpu_bytes() * _CPU_SHARE / num_ranks))


def cuda_cache_bytes(utilization: float, activation_bytes: int) -> int:
    """What is left of the GPU for the cache; raises EngineArgsError if nothing is."""
    free, total = torch.cuda.mem_get_info()
    left = int(total * utilization) - (total - free) - activation_bytes
    between = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    found = (
        f"{(total - free) / GIB:.1f} GiB are in use, {between / GIB:.1f} of them between tensors, "
        f"and a step needs {activation_bytes / GIB:.1f} GiB"
    )
    if left <= 0:
        raise EngineArgsError(
            "gpu_memory_utilization",
            f"{utilization} of {total / GIB:.1f} GiB leaves no room for a KV cache: {found}",
        )
    logger.info("of the GPU's %.1f GiB %s; %.1f GiB are left to the KV cache", total / GIB, found, left / GIB)
    return left


def plan_cache(
    num_blocks: int, block_size: int, block_bytes: int, asked_len: int | None, config_len: int
) -> CachePlan:
    """Fits the context to the cache; raises EngineArgsError, with numbers, if the asked one does not fit."""
    capacity = num_blocks * block_size
    if num_blocks < 1 or (asked_len is not None and asked_len > capacity):
        wanted = asked_len or block_size
        raise EngineArgsError(
            "max_model_len",
            f"{wanted} tokens need {_mib(-(-wanted // block_size) * block_bytes)} of KV cache; there are "
            f"{_mib(num_blocks * block_bytes)}, which hold {capacity} tokens",
        )
    return CachePlan(num_blocks, min(asked_len or config_len, capacity))


def peak_host_bytes() -> int:
    """The most memory that this process has had, pages of mapped files among it."""
    return _proc_bytes(Path("/proc/self/status"), "VmHWM:")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _proc_bytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {name}")
