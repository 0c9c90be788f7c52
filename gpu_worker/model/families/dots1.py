"""dots.llm1 (Xiaohongshu): DeepSeek-V3's routing by sigmoid, groups and bias, with plain attention.

DeepSeek's own models have multi-head latent attention, which this decoder does not compute.
"""

from __future__ import annotations

from typing import Any

from gpu_worker.config import GroupedRouting
from gpu_worker.model.families.family import Family, num_experts
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    num_groups = keys.size("n_group", 1)
    return {
        "num_experts": num_experts(keys),
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "num_shared_experts": keys.size("n_shared_experts", 0, minimum=0),
        "moe_layer_start_index": keys.size("first_k_dense_replace", 0, minimum=0),
        "moe_layer_end_index": keys.size("num_hidden_layers") - 1,
        "moe_layer_interval": 1,
        "norm_min": 0.0,
        "qk_norm": "head",
        "grouped_routing": GroupedRouting(
            num_groups=num_groups,
            num_chosen_groups=keys.size("topk_group", num_groups),
            is_normalized=keys.flag("norm_topk_prob", False),
            scale=keys.number("routed_scaling_factor", 1.0),
        ),
    }


DOTS1 = Family(
    "dots1",
    _fields,
    names={".mlp.moe_statics.e_score_correction_bias": ".mlp.gate.e_score_correction_bias"},
    supported={
        "attention_bias": (False,),
        "moe_layer_freq": (1,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "rope_scaling": (None,),
    },
)
