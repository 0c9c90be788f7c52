"""What a model family declares of itself; docs/adding_a_model.md tells how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_worker.model.json_keys import Keys

NO_NORMALIZATION = 1.0  # as the least sum to divide by: a softmax's probabilities never sum to more
NORMALIZATION = 1e-12


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's config.json and Hugging Face checkpoint differ from the decoder's own words."""

    model_type: str
    # The fields of ModelConfig that do not follow from the keys that all families share.
    fields: Callable[[Keys], dict[str, Any]]
    # Parts of our tensor names, and what the family's checkpoints have in their place; in this order.
    names: Mapping[str, str] = field(default_factory=dict)
    # Values that keys may have; any other would be computed wrongly, so it is refused.
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # q and k rows of a head are all first members of the rotary pairs, then all second ones.
    has_rotary_halves: bool = True

    def stored_name(self, name: str) -> str:
        """Our name of a tensor as the family's checkpoints write it."""
        for ours, theirs in self.names.items():
            name = name.replace(ours, theirs)
        return name


def softmax_norm_min(keys: Keys, default: bool = False) -> float:
    """`norm_min` for a softmax router by the key `norm_topk_prob`."""
    return NORMALIZATION if keys.flag("norm_topk_prob", default) else NO_NORMALIZATION


def num_experts(keys: Keys) -> int:
    """transformers 5 writes `num_local_experts` where older files have a name of their own."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return keys.size(next((name for name in names if name in keys), "num_experts"))


def all_layers(num_layers: int) -> dict[str, Any]:
    """Every layer is a mixture of experts."""
    return {"moe_layer_start_index": 0, "moe_layer_end_index": num_layers - 1, "moe_layer_interval": 1}
