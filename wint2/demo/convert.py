"""Dense Llama to ERNIE-4.5-MoE: the FFN's neurons are dealt out to one shared and eight routed experts.

With all eight experts chosen for every token the function is unchanged: the router's softmax gives each 1/8,
which the routed down projections, multiplied by 8, undo.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wint2.demo.source import DenseModel

NUM_EXPERTS = 8
EXPERT_SIZE = 128
NUM_SHARED = 4  # shared experts, fused into one MLP
_ROUTER_DEVIATION = 1e-6  # near zero: the weights stay 1/8, yet the order of experts is defined

_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}


@dataclass(frozen=True)
class Neurons:
    """Which of a layer's neurons go where."""

    shared: Tensor  # int64 [NUM_SHARED * EXPERT_SIZE]
    routed: tuple[Tensor, ...]  # NUM_EXPERTS times int64 [EXPERT_SIZE]

    @classmethod
    def deal(cls, importance: Tensor) -> "Neurons":
        """The most important neurons are shared, the rest dealt out in the order of importance."""
        order = importance.argsort(descending=True, stable=True)
        shared, rest = order[: NUM_SHARED * EXPERT_SIZE], order[NUM_SHARED * EXPERT_SIZE :]
        return cls(shared, tuple(rest[e::NUM_EXPERTS] for e in range(NUM_EXPERTS)))


def config(dense: DenseModel) -> dict[str, Any]:
    """config.json in the words of Hugging Face's Ernie4_5_MoeConfig."""
    heads = dense.number("attention.head_count")
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "dtype": "bfloat16",
        "bos_token_id": dense.fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": dense.fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": dense.fields["tokenizer.ggml.padding_token_id"],
        "vocab_size": dense.number("vocab_size"),
        "hidden_size": dense.number("embedding_length"),
        "intermediate_size": dense.number("feed_forward_length"),
        "num_hidden_layers": dense.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": dense.number("attention.head_count_kv"),
        "head_dim": dense.number("embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": dense.number("context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": dense.number("rope.freq_base"),
        "rope_parameters": {"rope_type": "default", "rope_theta": dense.number("rope.freq_base")},
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_SIZE,
        "moe_num_shared_experts": NUM_SHARED,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": dense.number("block_count") - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }


def generation_config(dense: DenseModel) -> dict[str, Any]:
    """generation_config.json: where an answer ends, and that greedy decoding is the default."""
    ids = {name: dense.fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
        "do_sample": False,
    }


def outer_tensors(dense: DenseModel) -> Iterator[tuple[str, Tensor]]:
    """Embedding (which is the head too) and final norm, bf16, under their HF names."""
    yield "model.embed_tokens.weight", dense["token_embd.weight"].bfloat16()
    yield "model.norm.weight", dense["output_norm.weight"].bfloat16()


def layer_tensors(dense: DenseModel, layer: int, neurons: Neurons) -> Iterator[tuple[str, Tensor]]:
    """One decoder layer under its HF names: bf16, router and correction bias float32."""
    prefix, block = f"model.layers.{layer}", f"blk.{layer}"
    yield f"{prefix}.input_layernorm.weight", dense[f"{block}.attn_norm.weight"].bfloat16()
    yield f"{prefix}.post_attention_layernorm.weight", dense[f"{block}.ffn_norm.weight"].bfloat16()
    for name, stored in _ATTENTION.items():
        yield f"{prefix}.self_attn.{name}_proj.weight", dense[f"{block}.{stored}.weight"].bfloat16()
    yield from _router(f"{prefix}.mlp", layer, dense.number("embedding_length"))
    parts = {name: dense[f"{block}.ffn_{name}.weight"] for name in ("gate", "up", "down")}
    yield from _mlp(f"{prefix}.mlp.shared_experts", parts, neurons.shared, 1)
    for expert, members in enumerate(neurons.routed):
        yield from _mlp(f"{prefix}.mlp.experts.{expert}", parts, members, NUM_EXPERTS)


def _router(prefix: str, layer: int, hidden_size: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(layer)
    yield (
        f"{prefix}.gate.weight",
        torch.randn(NUM_EXPERTS, hidden_size, generator=generator) * _ROUTER_DEVIATION,
    )
    yield f"{prefix}.moe_statics.e_score_correction_bias", torch.zeros(1, NUM_EXPERTS)


def _mlp(prefix: str, parts: dict[str, Tensor], members: Tensor, gain: int) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate_proj.weight", parts["gate"][members].bfloat16()
    yield f"{prefix}.up_proj.weight", parts["up"][members].bfloat16()
    yield f"{prefix}.down_proj.weight", (parts["down"][:, members] * gain).bfloat16()
