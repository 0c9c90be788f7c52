"""DeepSeek-MoE 16B: DeepSeek-V2-Lite's mixture (softmax, not normalized, shared experts), plain attention."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families.family import Family, num_experts, softmax_norm_min
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts": num_experts(keys),
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "num_shared_experts": keys.size("n_shared_experts", 0, minimum=0),
        "moe_layer_start_index": keys.size("first_k_dense_replace", 0, minimum=0),
        "moe_layer_end_index": keys.size("num_hidden_layers") - 1,
        "moe_layer_interval": 1,
        "norm_min": softmax_norm_min(keys),
    }


DEEPSEEK = Family(
    "deepseek",
    _fields,
    supported={
        "attention_bias": (False,),
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
        "routed_scaling_factor": (1, 1.0),
        "rope_scaling": (None,),
    },
)
