"""Qwen2 MoE (Alibaba): Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B; biased q, k, v and a gated shared expert."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families import qwen3_moe
from gpu_worker.model.families.family import Family
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    return qwen3_moe.fields(keys) | {
        "qk_norm": "none",
        "has_qkv_bias": keys.flag("qkv_bias", True),
        "num_shared_experts": 1,
        "shared_intermediate_size": keys.size("shared_expert_intermediate_size"),
        "has_shared_gate": True,
    }


QWEN2_MOE = Family(
    "qwen2_moe",
    _fields,
    names={".mlp.shared_experts.": ".mlp.shared_expert."},
    supported={"use_sliding_window": (False,), "rope_scaling": (None,)},
)
