"""What a worker says of itself on the wire, from the engine that was built."""

from __future__ import annotations

import uuid
from importlib.metadata import version

import torch

from gpu_worker.config import CacheConfig, EngineConfig, ModelConfig
from gpu_worker.engine.build import BuiltEngine, describe_quantization
from gpu_worker.settings import WorkerSettings
from protos.wint2.worker.v1 import worker_pb2


def model_info(settings: WorkerSettings, built: BuiltEngine) -> worker_pb2.GetModelInfoResponse:
    model = built.config.model
    return worker_pb2.GetModelInfoResponse(
        served_model_name=settings.served_model_name or settings.model.resolve().name,
        model_path=str(settings.model),
        model_type=model.model_type,
        max_model_len=built.config.scheduler.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        quantization=describe_quantization(model.quantization, model.num_hidden_layers),
        weight_bytes=sum(built.model.memory.device_bytes.values()),
        num_parameters=count_parameters(model),
    )


def server_info(config: EngineConfig) -> worker_pb2.GetServerInfoResponse:
    """With an instance id that is new for every start."""
    limits, cache = config.scheduler, config.cache
    return worker_pb2.GetServerInfoResponse(
        version=version("wint2"),
        instance_id=uuid.uuid4().hex,
        device=device_name(config.device),
        dtype=str(config.dtype).removeprefix("torch."),
        tensor_parallel_size=config.tensor_parallel_size,
        block_size=cache.block_size,
        num_kv_blocks=cache.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enable_prefix_caching=cache.enable_prefix_caching,
        enable_chunked_prefill=limits.enable_chunked_prefill,
    )


def cache_config(cache: CacheConfig) -> dict[str, str]:
    """The labels of the metric `cache_config_info`."""
    return {
        "block_size": str(cache.block_size),
        "num_gpu_blocks": str(cache.num_blocks),
        "cache_dtype": str(cache.dtype).removeprefix("torch."),
        "enable_prefix_caching": str(cache.enable_prefix_caching),
    }


def count_parameters(model: ModelConfig) -> int:
    """Weights, norms and biases of the model as if unquantized."""
    hidden, layers = model.hidden_size, range(model.num_hidden_layers)
    attention = 2 * hidden * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    dense = 3 * hidden * model.intermediate_size
    expert = 3 * hidden * model.moe_intermediate_size
    moe = model.num_experts * (expert + hidden + 1) + 3 * hidden * model.shared_size
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * hidden
    inner = sum(moe if model.is_moe_layer(layer) else dense for layer in layers)
    return embeddings + inner + len(layers) * (attention + 2 * hidden) + hidden


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
