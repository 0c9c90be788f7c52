"""The keywords of `LLM(...)`: this project's own, and FastDeploy's and vLLM's in its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from gpu_worker.engine.build import EngineArgs
from gpu_worker.engine.errors import EngineArgsError

RENAMED = {
    "num_gpu_blocks_override": "num_kv_blocks",
    "load_choices": "load_format",
}
VALUES: dict[str, dict[Any, str]] = {
    "load_format": {"default": "auto", "default_v1": "auto", "safetensors": "auto"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "dtype": {torch.float32: "float32", torch.bfloat16: "bfloat16", "float": "float32"},
}

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
    "guided_decoding_backend": "structured output is always offered, by llguidance",
    "enable_chunked_moe": "the MoE layer chooses its own tiles",
    "chunked_moe_size": "the MoE layer chooses its own tiles",
    "disable_custom_all_reduce": "there is nothing to reduce on one device",
    "lm_head_fp32": "logits are always float32",
    "max_logprobs": "logprobs are always on",
    "served_model_name": "an LLM answers no requests by name",
    "tool_call_parser": "an LLM returns the text as it is",
    "tool_parser_plugin": "an LLM returns the text as it is",
    "reasoning_parser": "an LLM returns the text as it is",
    "skip_port_check": "an LLM opens no port",
    "rdma_comm_ports": "an LLM opens no port",
    "cache_transfer_protocol": "the KV cache stays where it is",
    "write_policy": "the KV cache stays where it is",
    "load_strategy": "weights are mapped, and read as they are needed",
    "task": "a model generates",
    "runner": "a model generates",
    "convert": "a model generates",
    "model_impl": "there is one implementation of each family",
    "local_data_parallel_id": "a worker runs the model on one device",
    "ips": "a worker runs the model on one device",
    "disable_sequence_parallel_moe": "a worker runs the model on one device",
    "enable_flashinfer_allreduce_fusion": "there is nothing to reduce on one device",
    "use_internode_ll_two_stage": "there is nothing to reduce on one device",
    "shutdown_comm_group_if_worker_idle": "there is nothing to reduce on one device",
    "disable_chunked_mm_input": "models that see images are not supported",
    "max_encoder_cache": "models that see images are not supported",
    "max_processor_cache": "models that see images are not supported",
    "scheduler_name": "an LLM has no requests from outside to schedule",
    "scheduler_max_size": "an LLM has no requests from outside to schedule",
    "scheduler_ttl": "an LLM has no requests from outside to schedule",
    "scheduler_host": "an LLM has no requests from outside to schedule",
    "scheduler_port": "an LLM has no requests from outside to schedule",
    "scheduler_db": "an LLM has no requests from outside to schedule",
    "scheduler_password": "an LLM has no requests from outside to schedule",
    "scheduler_topic": "an LLM has no requests from outside to schedule",
    "scheduler_min_load_score": "an LLM has no requests from outside to schedule",
    "scheduler_load_shards_num": "an LLM has no requests from outside to schedule",
    "scheduler_sync_period": "an LLM has no requests from outside to schedule",
    "scheduler_expire_period": "an LLM has no requests from outside to schedule",
    "scheduler_release_load_expire_period": "an LLM has no requests from outside to schedule",
    "scheduler_reader_parallel": "an LLM has no requests from outside to schedule",
    "scheduler_writer_parallel": "an LLM has no requests from outside to schedule",
    "scheduler_reader_batch_size": "an LLM has no requests from outside to schedule",
    "scheduler_writer_batch_size": "an LLM has no requests from outside to schedule",
    "router": "an LLM has no requests from outside to schedule",
    "swap_space": "a sequence that must make room is computed anew, not swapped",
    "trust_remote_code": "no code is ever loaded from a model's folder",
    "disable_log_stats": "an LLM logs no statistics",
}

# Leaving them out would change the results, or what the caller may rely on.
REFUSED = {
    "data_parallel_size": "start several workers and a gateway: wint2 serve",
    "enable_expert_parallel": "a worker runs the model on one device",
    "speculative_config": "there is no speculative decoding",
    "cpu_offload_gb": "weights are not offloaded",
    "kvcache_storage_backend": "the KV cache lives in the device's own memory",
    "splitwise_role": "prompts and completions are computed by the same engine",
    "dynamic_load_weight": "weights are read once, at the start",
    "logits_processors": "logits processors cannot be loaded by name",
    "enable_mm": "models that see images are not supported",
    "limit_mm_per_prompt": "models that see images are not supported",
    "mm_processor_kwargs": "models that see images are not supported",
    "override_pooler_config": "a model generates; embeddings are not computed",
    "model_config_name": "the file is config.json",
    "tokenizer_base_url": "the tokenizer runs in this process: give its folder as tokenizer",
    "rsync_config": "weights are read once, at the start",
    "enable_eplb": "a worker runs the model on one device",
    "eplb_config": "a worker runs the model on one device",
    "plas_attention_config": "attention is always dense",
    "early_stop_config": "completions end at a stop token, a stop string or max_tokens",
    "enable_early_stop": "completions end at a stop token, a stop string or max_tokens",
    "guided_decoding_disable_any_whitespace": "whitespace in structured output is the grammar's",
    "enable_keep_sampling_mask": "sampling masks are not returned",
    "enable_entropy": "entropies are not returned",
    "logprobs_mode": "logprobs are those of the model's own distribution, raw_logprobs",
    "routing_replay_config": "routing cannot be replayed",
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
    "cpu_offload_gb": (0,),
    "splitwise_role": ("mixed",),
    "model_config_name": ("config.json",),
    "logprobs_mode": ("raw_logprobs",),
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
        yield own, VALUES[own].get(value, value) if own in VALUES else value


def _suggestion(name: str) -> str:
    close = get_close_matches(name, [*_OWN, *RENAMED, *NOTED], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
