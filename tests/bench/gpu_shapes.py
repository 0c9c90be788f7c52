"""ERNIE 4.5's shapes as model folders without weights, for `--load-format dummy`, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

COMMON: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 103424,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "use_bias": False,
    "moe_num_experts": 64,
    "head_dim": 128,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Of no published model: for trying the benchmarks on a CPU.
    "small": COMMON
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "21b": COMMON
    | {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "300b": COMMON
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "moe_k": 8,
        "moe_intermediate_size": 3584,
        "moe_layer_start_index": 3,
        "tie_word_embeddings": False,
    },
}
LAST_WINT4_LAYER = 6
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def config(shape: str, num_layers: int) -> dict[str, Any]:
    """config.json of the shape, cut to its first layers, quantized as the published checkpoint is."""
    moe = {
        "quant_type": "w4w2",
        "moe_w4_quant_config": {"quant_type": "wint4", "quant_end_layer": LAST_WINT4_LAYER},
        "moe_w2_quant_config": {"quant_type": "wint2", "quant_group_size": 64},
    }
    quantization = {"quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_config": moe}
    return SHAPES[shape] | {"num_hidden_layers": num_layers, "quantization_config": quantization}


def write_model_folder(folder: Path, shape: str, num_layers: int | None = None) -> None:
    """config.json and a tokenizer: a byte of a prompt is a token, and every other token is a word."""
    layers = num_layers or SHAPES[shape]["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config(shape, layers)))
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{index}" for index in range(len(words), COMMON["vocab_size"])]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
