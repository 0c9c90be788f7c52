"""A seeded tiny ERNIE-4.5-MoE checkpoint with a tokenizer, so that every service can start in a test.

Written from the format's description, not with the loader's code: the two must meet in the tests.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cuda_kernels.formats import wint2, wint4, wint8
from cuda_kernels.formats.layout import KOrder, pad_rows

VOCAB_SIZE = 300
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
MERGES = "Ġ t|h e|i n|r e|o n|Ġt he|Ġ a|e r|a t|o u|e n|o r|Ġ s|Ġ w|i t|e s|a n|Ġ b|Ġ c|o f|i s|a l|in g"
CHAT_TEMPLATE = (
    "{{- '<|begin_of_sentence|>' -}}"
    "{%- for tool in tools or [] -%}{{ 'Function: ' + (tool.function | tojson) + '\\n' }}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\\n' }}"
    "{%- elif message.role == 'tool' -%}{{ 'Result: ' + message.content + '\\n' }}"
    "{%- else -%}{{ 'Assistant: ' + message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor -%}"
    "{{ '<|end_of_sentence|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)

CONFIG = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "use_bias": False,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Layer 0 is dense, layer 1 has WINT4 experts, layer 2 WINT2 experts.
QUANTIZATION_CONFIG = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 1,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 2,
            "quant_end_layer": 2,
        },
    },
}


def make_tiny_model(path: Path, *, quantized: bool, seed: int = 0, **overrides: object) -> Path:
    """Write a model folder: HF layout in bf16, or Paddle's layout in WINT8, WINT4 and WINT2.

    `overrides` are keys of config.json. The same seed gives the same weights in both layouts.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIG | overrides
    weights = tiny_weights(config, seed)
    if quantized:
        config = config | {"quantization_config": QUANTIZATION_CONFIG}
        save_file(paddle_tensors(config, weights), path / "model.safetensors", metadata={"format": "np"})
    else:
        save_hf(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    words = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    words += [f"<|reserved_{index}|>" for index in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "chat_template": CHAT_TEMPLATE,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 4]}))


def tiny_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names, linears [out, in]; bf16, the router float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor if "gate.weight" in name or "bias" in name else tensor.bfloat16()
        for name, tensor in ((n, _draw(n, s, generator)) for n, s in hf_shapes(config).items())
    }


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if "bias" in name:
        return 0.1 * noise
    # Small embeddings and large projections: else a tied head repeats the last token for ever.
    return 0.2 * noise if "embed" in name else 2 * noise * shape[-1] ** -0.5


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of an HF checkpoint of this config, by name."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (query, hidden),
            f"{prefix}self_attn.k_proj.weight": (key, hidden),
            f"{prefix}self_attn.v_proj.weight": (key, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, query),
        }
        shapes |= _mlp_shapes(config, layer, f"{prefix}mlp.")
    return shapes


def is_moe_layer(config: dict, layer: int) -> bool:
    in_range = config["moe_layer_start_index"] <= layer <= config["moe_layer_end_index"]
    return in_range and (layer + 1) % config["moe_layer_interval"] == 0


def _mlp_shapes(config: dict, layer: int, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    if not is_moe_layer(config, layer):
        return _swiglu_shapes(prefix, hidden, config["intermediate_size"])
    num_experts = config["moe_num_experts"]
    shapes = {
        f"{prefix}gate.weight": (num_experts, hidden),
        f"{prefix}moe_statics.e_score_correction_bias": (1, num_experts),
    }
    for expert in range(num_experts):
        shapes |= _swiglu_shapes(f"{prefix}experts.{expert}.", hidden, inner)
    if config["moe_num_shared_experts"]:
        shared = inner * config["moe_num_shared_experts"]
        shapes |= _swiglu_shapes(f"{prefix}shared_experts.", hidden, shared)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def save_hf(weights: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file as save_torch_file

    save_torch_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})


def paddle_tensors(
    config: dict, weights: dict[str, torch.Tensor], k_order: KOrder = "shuffled"
) -> dict[str, np.ndarray]:
    """Paddle's names: fused linears stored [in, out], bf16 labelled U16; quantized if the config says so."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in _fuse(weights).items():
        paddle_name = name.replace("model.", "ernie.", 1)
        is_linear = "_proj" in name or name.endswith("gate.weight") or name == "lm_head.weight"
        tensors |= _store(config, paddle_name, weight.T if is_linear else weight, k_order)
    return {name: _as_numpy(tensor.contiguous()) for name, tensor in tensors.items()}


def _fuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif name.endswith("gate_proj.weight"):
            both = [weight, weights[name.replace("gate_proj", "up_proj")]]
            fused[name.replace("gate_proj", "up_gate_proj")] = torch.cat(both)
        elif not name.endswith(("k_proj.weight", "v_proj.weight", ".up_proj.weight")):
            fused[name] = weight
    return fused


def _store(
    config: dict, name: str, weight: torch.Tensor, k_order: KOrder = "shuffled"
) -> dict[str, torch.Tensor]:
    if "quantization_config" not in config or "_proj" not in name or "shared_experts" in name:
        return {name: weight}
    stem = name.removesuffix("weight")
    if ".experts." not in name:
        packed = wint8.quantize(pad_rows(weight.float(), 64))
        return _pair(stem, wint8.pack(packed.quant_weight), packed.weight_scale)
    w4_config = config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]
    if int(name.split(".")[2]) <= w4_config["quant_end_layer"]:
        packed4 = wint4.quantize(pad_rows(weight.float(), 64))
        return _pair(stem, wint4.pack(packed4.quant_weight), packed4.weight_scale)
    stored = wint2.quantize(pad_rows(weight.float()), effort="fast", k_order=k_order)
    return {stem + suffix: tensor for suffix, tensor in stored.tensors().items()}


def _pair(stem: str, quant_weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{stem}quant_weight": quant_weight, f"{stem}weight_scale": scale}


def dequantized(config: dict, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, under Hugging Face's names, that the quantized checkpoint stands for; float32."""
    config = config | {"quantization_config": QUANTIZATION_CONFIG}
    result = {name: weight.float() for name, weight in weights.items()}
    for name, weight in _fuse(weights).items():
        stored = _store(config, name, weight.T if "_proj" in name else weight)
        if name not in stored:
            parts = {key.rpartition(".")[2]: tensor for key, tensor in stored.items()}
            result |= _split(name, decode_stored(parts, weight.shape[1]).T.float(), weights)
    return result


def decode_stored(parts: dict[str, torch.Tensor], num_rows: int) -> torch.Tensor:
    """Level times scales as they are, without the rounding of the products to bfloat16."""
    if "code_scale" in parts:
        levels, local = wint2.unpack(wint2.Wint2Weight(**parts))
        local_KN = local.float().repeat_interleave(64, dim=0)
        return (levels * local_KN * parts["super_scales"].float())[:num_rows]
    levels, scale = parts["quant_weight"], parts["weight_scale"]
    module = wint8 if levels.shape[0] == scale.shape[0] else wint4
    return (module.unpack(levels) * scale.float())[:num_rows]


def _split(name: str, fused: torch.Tensor, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fusions = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}
    leaf = name.split(".")[-2]
    names = [name.replace(leaf, part) for part in fusions.get(leaf, (leaf,))]
    return dict(zip(names, fused.split([weights[part].shape[0] for part in names]), strict=True))


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
