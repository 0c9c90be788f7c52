"""From a model folder and a handful of wishes to an engine: device, weights, memory plan, KV cache."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from gpu_worker.config import CacheConfig, EngineConfig, ModelConfig, QuantizationConfig, SchedulerConfig
from gpu_worker.engine.cuda_graphs import CudaCapture, DecodeGraphs
from gpu_worker.engine.devices import (
    ActivationsChoice,
    DeviceChoice,
    choose_activations,
    choose_device,
    choose_dtype,
)
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.followers import Followers, LeadCache, LeadGraphs, LeadModel
from gpu_worker.engine.gpu_kernels import build_kernels
from gpu_worker.engine.grammars import Grammars
from gpu_worker.engine.memory import (
    GIB,
    choose_cache_dtype,
    choose_limits,
    cpu_cache_bytes,
    cuda_cache_bytes,
    kv_block_bytes,
    peak_host_bytes,
    plan_cache,
)
from gpu_worker.engine.phases import Phases
from gpu_worker.engine.preflight import check_fits
from gpu_worker.engine.profiling import measure_activation_bytes
from gpu_worker.engine.prompt_graphs import PromptGraphs, is_launch_bound
from gpu_worker.engine.runner import Model
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.layers.ranks import ALONE, Ranks
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.cpu_layers import with_compiled_layers
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.expert_counts import with_expert_counts
from gpu_worker.model.k_order import KOrderChoice
from gpu_worker.model.loader import LoadFormat, load_model
from gpu_worker.model.sharding import degree_problem

Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)

# Of the fields that take one of a few words.
CHOICES = {"load_format": LoadFormat, "k_order": KOrderChoice, "cpu_activations": ActivationsChoice}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """What may be asked of an engine; None and "auto" leave it to the model and the machine."""

    model: Path
    device: str = "auto"
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
    k_order: KOrderChoice = "auto"
    cpu_activations: ActivationsChoice = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 64
    num_kv_blocks: int | None = None
    kv_cache_memory_gib: float | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    use_cudagraph: bool = True
    count_expert_tokens: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                wanted = " or ".join(get_args(choices))
                raise EngineArgsError(name, f"must be {wanted}, got {getattr(self, name)!r}")
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineArgsError(name, f"must be at least 1, got {value}")
        num_seqs, num_tokens = self.max_num_seqs, self.max_num_batched_tokens
        if num_seqs is not None and num_tokens is not None and num_tokens < num_seqs:
            raise EngineArgsError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({num_seqs}), a token for each that decodes, "
                f"got {num_tokens}",
            )


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank computes with: its part of the model, the KV cache of its heads, CUDA graphs of both."""

    config: EngineConfig
    ranks: Ranks
    decoder: Decoder
    model: Model
    kv_cache: KVCache
    graphs: DecodeGraphs | None


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, its model, and what was found on the way, a line each. `close` it at the end."""

    engine: Engine
    model: Decoder
    description: tuple[str, ...]
    followers: Followers | None = None

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def failure(self) -> str | None:
        """Why the engine cannot go on, if another rank's end is why."""
        return self.followers.failure if self.followers else None

    def close(self) -> None:
        """Ends the processes of the other ranks."""
        if self.followers:
            self.followers.close()


def build_engine(
    args: EngineArgs,
    progress: Progress | None = None,
    make_grammars: Callable[[ModelConfig], Grammars] | None = None,
) -> BuiltEngine:
    """Loads the model and makes an engine. Raises ConfigError, CheckpointError, EngineArgsError or RankError.

    `progress` is called with the bytes of weights read so far and in all. Without grammars, requests for
    structured output are refused.
    """
    phases = Phases()
    size = args.tensor_parallel_size
    choice = choose_device(args.device, 0, size)
    num_seqs, num_tokens = choose_limits(args.max_num_seqs, args.max_num_batched_tokens, choice.device)
    args = replace(args, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    model_config = read_model_config(args.model)
    if problem := degree_problem(model_config, size):
        raise EngineArgsError("tensor_parallel_size", problem)
    for line in _preflight(args, model_config, choice):
        logger.info("%s", line)
    phases.end("preflight")
    if size == 1:
        return _build(args, model_config, choice, None, phases, progress, make_grammars)
    followers = Followers(size, choice.device, args)
    phases.end("ranks")
    try:
        with followers.explained():
            return _build(args, model_config, choice, followers, phases, progress, make_grammars)
    except BaseException:
        followers.close()
        raise


def _preflight(args: EngineArgs, model_config: ModelConfig, choice: DeviceChoice) -> Iterator[str]:
    dtype = choose_dtype(args.dtype, choice.device)
    cache_dtype = choose_cache_dtype(args.kv_cache_dtype, dtype, choice.device)
    cache_bytes = None if args.kv_cache_memory_gib is None else int(args.kv_cache_memory_gib * GIB)
    if args.num_kv_blocks is not None:
        cache_bytes = args.num_kv_blocks * kv_block_bytes(model_config, args.block_size, cache_dtype)
        cache_bytes //= args.tensor_parallel_size
    return check_fits(
        model_config,
        choice,
        args.gpu_memory_utilization,
        args.tensor_parallel_size,
        cache_dtype=cache_dtype,
        limits=_limits(args, choice.device),
        wanted_len=args.max_model_len,
        cache_bytes=cache_bytes,
    )


def _build(
    args: EngineArgs,
    model_config: ModelConfig,
    choice: DeviceChoice,
    followers: Followers | None,
    phases: Phases,
    progress: Progress | None,
    make_grammars: Callable[[ModelConfig], Grammars] | None,
) -> BuiltEngine:
    ranks = followers.ranks if followers else ALONE
    part = build_part(args, model_config, choice, ranks, progress, phases)
    grammars = make_grammars(part.config.model) if make_grammars else None
    phases.end("grammars")
    engine = _engine(part, followers, grammars)
    lines = *_describe(args, part.config, choice, part.decoder, part.kv_cache), f"start: {phases}"
    return BuiltEngine(engine, part.decoder, lines, followers)


def _engine(part: Part, followers: Followers | None, grammars: Grammars | None) -> Engine:
    if followers is None:
        return Engine(part.config, part.model, part.kv_cache, part.graphs, grammars)
    graphs = LeadGraphs(part.graphs, followers) if part.graphs else None
    model, kv_cache = LeadModel(part.model, followers), LeadCache(part.kv_cache, followers)
    return Engine(part.config, model, kv_cache, graphs, grammars)


def build_part(
    args: EngineArgs,
    model_config: ModelConfig,
    choice: DeviceChoice,
    ranks: Ranks,
    progress: Progress | None = None,
    phases: Phases | None = None,
) -> Part:
    """One rank's part; all ranks of a group build theirs at the same time."""
    phases = phases or Phases()
    if choice.device.type == "cpu" and ranks.size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.size))
    dtype = choose_dtype(args.dtype, choice.device)
    cache_dtype = choose_cache_dtype(args.kv_cache_dtype, dtype, choice.device)
    decoder = _load(args, model_config, choice.device, dtype, ranks, progress)
    phases.end("weights")
    build_kernels(decoder, choice.device, cache_dtype)
    decoder = with_expert_counts(decoder) if args.count_expert_tokens else with_compiled_layers(decoder)
    phases.end("kernels")
    config = _plan(args, model_config, choice.device, dtype, cache_dtype, decoder)
    kv_cache = _kv_cache(config, decoder.config)
    phases.end("KV cache")
    model, graphs = _capture(config, decoder, kv_cache)
    phases.end("CUDA graphs")
    return Part(config, ranks, decoder, model, kv_cache, graphs)


def _load(
    args: EngineArgs,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
    progress: Progress | None,
) -> Decoder:
    return load_model(
        model_config,
        device=device,
        dtype=dtype,
        progress=progress,
        load_format=args.load_format,
        k_order=args.k_order,
        activations=choose_activations(args.cpu_activations, model_config, device),
        ranks=ranks,
    )


def _kv_cache(config: EngineConfig, shape: ModelConfig) -> KVCache:
    cache = config.cache
    return KVCache(
        shape.num_hidden_layers,
        cache.num_blocks,
        cache.block_size,
        shape.num_key_value_heads,
        shape.head_dim,
        cache.dtype,
        config.device,
    )


def _plan(
    args: EngineArgs,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    model: Decoder,
) -> EngineConfig:
    config_len = model_config.max_position_embeddings
    block_bytes = kv_block_bytes(model.config, args.block_size, cache_dtype)
    wanted_len = args.max_model_len or config_len
    config = EngineConfig(
        model=model_config,
        cache=CacheConfig(args.block_size, 0, args.enable_prefix_caching, cache_dtype),
        scheduler=replace(_limits(args, device), max_model_len=wanted_len),
        device=device,
        dtype=dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        use_cudagraph=args.use_cudagraph and device.type == "cuda",
        overlap=device.type == "cuda",
        seed=args.seed,
    )
    num_blocks = args.num_kv_blocks or _cache_bytes(args, config, block_bytes, model) // block_bytes
    num_blocks = model.ranks.least(num_blocks, device)
    plan = plan_cache(num_blocks, args.block_size, block_bytes, args.max_model_len, config_len)
    limits = config.scheduler
    budget = limits.max_num_batched_tokens
    if not args.enable_chunked_prefill:
        budget = max(budget, plan.max_model_len)
    return replace(
        config,
        cache=replace(config.cache, num_blocks=plan.num_blocks),
        scheduler=replace(
            limits,
            max_model_len=plan.max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=min(limits.max_num_seqs, plan.num_blocks),  # each holds a block
        ),
    )


def _limits(args: EngineArgs, device: torch.device) -> SchedulerConfig:
    """What a step may hold; where nobody says, as the device's memory has it."""
    num_seqs, num_tokens = choose_limits(args.max_num_seqs, args.max_num_batched_tokens, device)
    return SchedulerConfig(num_seqs, num_tokens, enable_chunked_prefill=args.enable_chunked_prefill)


def _capture(config: EngineConfig, decoder: Decoder, kv_cache: KVCache) -> tuple[Model, DecodeGraphs | None]:
    """The model, with CUDA graphs of short prompts, and those of decode steps."""
    if not config.use_cudagraph:
        return decoder, None
    limits, capture, ranks = config.scheduler, CudaCapture(), decoder.ranks
    max_blocks = -(-limits.max_model_len // config.cache.block_size)
    decodes = DecodeGraphs(decoder, kv_cache, limits.max_num_seqs, max_blocks, config.device)
    decodes.capture(capture)
    prompts = PromptGraphs(decoder, kv_cache, max_blocks, config.device)
    # All ranks, or none: what one replays the others must.
    prompts.capture(capture, lambda run: bool(ranks.least(is_launch_bound(run), config.device)))
    return prompts, decodes


def _cache_bytes(args: EngineArgs, config: EngineConfig, block_bytes: int, model: Decoder) -> int:
    if args.kv_cache_memory_gib is not None:
        return int(args.kv_cache_memory_gib * GIB)
    if config.device.type == "cuda":
        return cuda_cache_bytes(args.gpu_memory_utilization, measure_activation_bytes(model, config))
    limits = config.scheduler
    token_bytes = block_bytes // args.block_size
    return cpu_cache_bytes(limits.max_num_seqs, token_bytes, limits.max_model_len, args.tensor_parallel_size)


def describe_quantization(quantization: QuantizationConfig, num_layers: int) -> str:
    """By layer range, in words: "experts of layers 0-6 wint4, 7-53 wint2; dense wint8"."""
    runs = [
        (name, list(layers))
        for name, layers in itertools.groupby(range(num_layers), quantization.expert_format)
    ]
    if {name for name, _ in runs} == {"none"} and quantization.dense == "none":
        return "none"
    experts = ", ".join(f"{layers[0]}-{layers[-1]} {name}" for name, layers in runs)
    return f"experts of layers {experts}; dense {quantization.dense}"


def _describe(
    args: EngineArgs, config: EngineConfig, choice: DeviceChoice, model: Decoder, kv_cache: KVCache
) -> Iterator[str]:
    shape, cache, limits = config.model, config.cache, config.scheduler
    dtype = _name(config.dtype)
    stored, held = sum(model.memory.stored_bytes.values()), sum(model.memory.device_bytes.values())
    yield f"device: {choice.device} ({choice.reason}), {dtype}"
    yield (
        f"model: {args.model}, {shape.num_hidden_layers} layers, {shape.num_experts} experts, "
        f"{shape.num_experts_per_token} a token, vocabulary {shape.vocab_size}"
    )
    yield f"quantization: {describe_quantization(shape.quantization, shape.num_hidden_layers)}"
    if config.tensor_parallel_size > 1:
        yield f"tensor parallel: {config.tensor_parallel_size} ranks; what follows is of each"
    kinds = ", ".join(f"{kind} {_mib(size)}" for kind, size in model.memory.device_bytes.items())
    yield f"weights: {_mib(stored)} stored, {_mib(held)} held: {kinds}"
    yield (
        f"KV cache: {cache.num_blocks} blocks of {cache.block_size} tokens, "
        f"{cache.num_blocks * cache.block_size} in all, {_mib(kv_cache.size_bytes)} of {_name(cache.dtype)}"
    )
    yield (
        f"limits: context {limits.max_model_len} tokens, {limits.max_num_seqs} sequences and "
        f"{limits.max_num_batched_tokens} tokens a step"
    )
    yield f"host memory: {_mib(peak_host_bytes())} at most so far"
    if args.use_cudagraph and choice.device.type == "cpu":
        yield "CUDA graphs: not on the CPU"
    if limits.max_num_batched_tokens != args.max_num_batched_tokens:
        yield f"max_num_batched_tokens: raised from {args.max_num_batched_tokens}, for the longest prompt"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
