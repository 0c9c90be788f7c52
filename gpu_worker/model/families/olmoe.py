"""OLMoE (Allen AI): 1B-7B; RMS norm over all query heads together, and over all key heads."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families.family import Family, all_layers, num_experts, softmax_norm_min
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    return all_layers(keys.size("num_hidden_layers")) | {
        "num_experts": num_experts(keys),
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "moe_intermediate_size": keys.size("intermediate_size"),
        "norm_min": softmax_norm_min(keys),
        "qk_norm": "all",
    }


OLMOE = Family(
    "olmoe",
    _fields,
    supported={"attention_bias": (False,), "clip_qkv": (None,), "rope_scaling": (None,)},
)
