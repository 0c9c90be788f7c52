"""Mixtral (Mistral AI): 8x7B, 8x22B; every layer a mixture, softmax over the chosen experts."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families.family import NORMALIZATION, Family, all_layers, num_experts
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    return all_layers(keys.size("num_hidden_layers")) | {
        "num_experts": num_experts(keys),
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "moe_intermediate_size": keys.size("intermediate_size"),
        "norm_min": NORMALIZATION,
    }


MIXTRAL = Family(
    "mixtral",
    _fields,
    names={".mlp.": ".block_sparse_moe.", ".gate_proj": ".w1", ".up_proj": ".w3", ".down_proj": ".w2"},
    supported={"sliding_window": (None,), "rope_scaling": (None,)},
)
