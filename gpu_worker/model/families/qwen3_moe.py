"""Qwen3 MoE (Alibaba): 30B-A3B, 235B-A22B; RMS norm of every query and key head."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families.family import Family, num_experts, softmax_norm_min
from gpu_worker.model.json_keys import Keys


def fields(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts": num_experts(keys),
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "moe_layer_start_index": 0,
        "moe_layer_end_index": keys.size("num_hidden_layers") - 1,
        "moe_layer_interval": keys.size("decoder_sparse_step", 1),
        "dense_layers": keys.sizes("mlp_only_layers"),
        "norm_min": softmax_norm_min(keys),
        "qk_norm": "head",
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    fields,
    supported={"attention_bias": (False,), "use_sliding_window": (False,), "rope_scaling": (None,)},
)
