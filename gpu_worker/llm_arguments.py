"""The keywords of `LLM(...)`: this project's own, and FastDeploy's and vLLM's in its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gpu_worker.engine.build import EngineArgs
from gpu_worker.engine.errors import EngineArgsError

RENAMED = {
    "num_gpu_blocks_override": "num_kv_blocks",
    "load_choices": "load_format",
}
LOAD_FORMATS = {"default": "auto", "default_v1": "auto", "safetensors": "auto"}

# What they ask for is so already, or concerns a mechanism that is not here.
NOTED = {
    "kv_cache_ratio": "KV blocks are taken one by one as a sequence grows, from one pool",
    "static_decode_blocks": "KV blocks are taken one by one as a sequence grows, from one pool",
    "prealloc_dec_block_slot_num_threshold": "KV blocks are taken one by one as a sequence grows",
    "enable_output_caching": "the KV blocks of completions are always kept for reuse",
    "enable_logprob": "logprobs are always on",
    "max_num_partial_prefills": "a prompt's chunks share the steps' token budget",
    "max_long_partial_prefills": "a prompt's chunks share the steps' token budget",
    "long_prefill_token_threshold": "a prompt's chunks share the steps' token budget",
    "engine_worker_queue_port": "an LLM opens no port",
    "cache_queue_port": "an LLM opens no port",
    "pd_comm_port": "an LLM opens no port",
    "use_warmup": "nothing needs warming up",
    "enable_overlap_schedule": "the next step is prepared as the engine sees fit",
    "enable_chunked_moe": "the MoE layer chooses its own tiles",
    "chunked_moe_size": "the MoE layer chooses its own tiles",
    "disable_custom_all_reduce": "there is nothing to reduce on one device",
    "lm_head_fp32": "logits are always float32",
    "trust_remote_code": "no code is ever loaded from a model's folder",
    "disable_log_stats": "an LLM logs no statistics",
}

# Leaving them out would change the results, or what the caller may rely on.
REFUSED = {
    "data_parallel_size": "start several workers and a gateway: wint2 serve",
    "enable_expert_parallel": "a worker runs the model on one device",
    "speculative_config": "there is no speculative decoding",
    "swap_space": "the KV cache lives in the device's own memory",
    "cpu_offload_gb": "weights are not offloaded",
    "kvcache_storage_backend": "the KV cache lives in the device's own memory",
    "splitwise_role": "prompts and completions are computed by the same engine",
    "dynamic_load_weight": "weights are read once, at the start",
    "guided_decoding_backend": "a request brings its own constraint; no backend is chosen at the start",
    "logits_processors": "logits processors cannot be loaded by name",
    "enable_mm": "models that see images are not supported",
    "enable_lora": "adapters are not supported",
    "hf_overrides": "config.json is used as it is",
    "compilation_config": "nothing is compiled",
    "quantization": "nothing is quantized while loading: run `wint2 quantize IN OUT` once and load OUT",
    "revision": "nothing is downloaded: give the checkpoint's folder",
}

# Values that ask for what is so anyway.
HARMLESS = {
    "revision": ("master", "main"),
    "quantization": ("wint2",),
    "data_parallel_size": (1,),
    "swap_space": (0,),
    "cpu_offload_gb": (0,),
    "splitwise_role": ("mixed",),
    "guided_decoding_backend": ("off", "auto"),
}

_OWN = tuple(field.name for field in fields(EngineArgs))


def read_arguments(model: str | Path, keywords: Mapping[str, Any]) -> tuple[EngineArgs, list[str]]:
    """The engine's arguments, and a note for every keyword that has no effect.

    TypeError names an unknown keyword; EngineArgsError says why a known one is refused.
    """
    own: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in keywords.items():
        if name in NOTED:
            notes.append(f"{name} has no effect: {NOTED[name]}")
        else:
            own |= dict(_translate(name, value))
    return EngineArgs(model=Path(model), **own), notes


def _translate(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The engine's own arguments that say the same."""
    if name in REFUSED:
        if value and value not in HARMLESS.get(name, ()):
            raise EngineArgsError(name, f"is not supported: {REFUSED[name]}")
    elif name == "enforce_eager":
        yield "use_cudagraph", not value
    elif name == "graph_optimization_config":
        yield "use_cudagraph", bool((value or {}).get("use_cudagraph", True))
    elif RENAMED.get(name, name) not in _OWN:
        raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{_suggestion(name)}")
    elif value is not None:
        own = RENAMED.get(name, name)
        yield own, LOAD_FORMATS.get(value, value) if own == "load_format" else value


def _suggestion(name: str) -> str:
    close = get_close_matches(name, [*_OWN, *RENAMED, *NOTED], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
