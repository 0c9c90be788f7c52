"""ERNIE 4.5 MoE (Baidu): 21B-A3B, 300B-A47B; interleaved rotary pairs, a correction bias in the choice."""

from __future__ import annotations

from typing import Any

from gpu_worker.model.families.family import Family
from gpu_worker.model.json_keys import Keys


def _fields(keys: Keys) -> dict[str, Any]:
    num_layers = keys.size("num_hidden_layers")
    inner = keys.size("moe_intermediate_size")
    return {
        "compression_ratio": keys.number("compression_ratio", 1.0),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", True),
        "num_experts": keys.size("moe_num_experts"),
        "num_experts_per_token": keys.size("moe_k"),
        "moe_intermediate_size": inner,
        "num_shared_experts": keys.size("moe_num_shared_experts", 0, minimum=0),
        "moe_layer_start_index": keys.size("moe_layer_start_index", 0, minimum=0),
        "moe_layer_end_index": _moe_layer_end(keys, num_layers),
        "moe_layer_interval": keys.size("moe_layer_interval", 1),
        "norm_min": keys.number("moe_norm_min", 1e-12),
    }


def _moe_layer_end(keys: Keys, num_layers: int) -> int:
    """The last MoE layer; absent or -1: the model's last."""
    if keys.value("moe_layer_end_index") == -1:
        return num_layers - 1
    return keys.size("moe_layer_end_index", num_layers - 1, minimum=0)


ERNIE = Family(
    "ernie4_5_moe",
    _fields,
    has_rotary_halves=False,
    supported={
        "use_bias": (False,),
        "use_rmsnorm": (True,),
        "use_qk_norm": (False,),
        "moe_gate": ("topk", "topk_fused"),
        "sliding_window": (None,),
        "rope_scaling": (None,),
    },
)
