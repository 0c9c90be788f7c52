"""config.json and generation_config.json to a ModelConfig, each problem named by its key."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gpu_worker.config import ModelConfig
from gpu_worker.model.families import FAMILIES
from gpu_worker.model.families.ernie import ERNIE
from gpu_worker.model.families.family import Family
from gpu_worker.model.json_keys import Keys, read_json
from gpu_worker.model.quantization_config import read_quantization_config

_log = logging.getLogger(__name__)

_LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "deepseek_v32")

# Keys of published files that tell of training, of other software, or what the weights say by themselves.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "aux_loss_alpha", "bos_token_id", "cls_token_id", "dtype", "ep_size", "head_type",
    "initializer_range", "is_moe_quantized", "kv_channels", "mask_token_id", "max_window_layers",
    "model_name", "moe_aux_loss_coef", "moe_aux_loss_lambda", "moe_capacity", "moe_dropout_prob",
    "moe_group", "moe_use_aux_free", "num_nextn_predict_layers", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "return_dict",
    "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "seq_aux", "seq_length",
    "sliding_window", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "weight_share_add_bias",
}  # fmt: skip


def read_model_config(path: Path) -> ModelConfig:
    """The model in folder `path`. Raises ConfigError with all that is wrong."""
    keys = Keys(read_json(path / "config.json"))
    family = _family(keys)
    _check_supported(keys, family)
    config = _config(path, keys, family)
    keys.check()
    _check_consistent(keys, config)
    keys.check()
    if unknown := sorted(set(keys.unread()) - _WITHOUT_EFFECT):
        _log.warning("config.json: unknown keys ignored: %s", ", ".join(unknown))
    return config


def _family(keys: Keys) -> Family:
    model_type = keys.text("model_type", ERNIE.model_type)
    if model_type in _LATENT_ATTENTION:
        message = f"is {model_type!r}, whose multi-head latent attention this decoder does not compute"
        raise keys.error("model_type", message)
    if model_type not in FAMILIES:
        raise keys.error("model_type", f"is {model_type!r}; supported: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[model_type]


def _config(path: Path, keys: Keys, family: Family) -> ModelConfig:
    hidden_size, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    shared: dict[str, Any] = {
        "path": path,
        "model_type": family.model_type,
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("intermediate_size"),
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.size("num_key_value_heads", num_heads),
        "head_dim": keys.size("head_dim", max(1, hidden_size // num_heads)),
        "rms_norm_eps": keys.number("rms_norm_eps", 1e-5),
        "rope_theta": _rope_theta(keys),
        "compression_ratio": 1.0,
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "max_position_embeddings": keys.size("max_position_embeddings"),
        "num_shared_experts": 0,
        "eos_token_ids": _eos_token_ids(path, keys),
        "quantization": read_quantization_config(keys),
    }
    return ModelConfig(**shared | family.fields(keys))


def _check_supported(keys: Keys, family: Family) -> None:
    for key, supported in {"hidden_act": ("silu",), **family.supported}.items():
        if key in keys and keys.value(key) not in supported:
            wanted = " or ".join(map(repr, supported))
            keys.wrong(key, f"is {keys.value(key)!r}; this decoder computes only {wanted}")
    layer_types = keys.value("layer_types") or []
    if not isinstance(layer_types, list) or any(one != "full_attention" for one in layer_types):
        keys.wrong("layer_types", "must be 'full_attention' for every layer")


def _check_consistent(keys: Keys, config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        message = f"({config.num_key_value_heads}) does not divide {config.num_attention_heads} query heads"
        keys.wrong("num_key_value_heads", message)
    if config.head_dim % 2:
        keys.wrong("head_dim", f"must be even for rotary embedding, got {config.head_dim}")
    if config.num_experts_per_token > config.num_experts:
        keys.wrong("moe_k", f"({config.num_experts_per_token}) exceeds {config.num_experts} experts")


def _rope_theta(keys: Keys) -> float:
    """`rope_theta`, or `rope_parameters.rope_theta` as transformers 5 writes it."""
    parameters = keys.section("rope_parameters")
    if parameters.text("rope_type", "default") != "default":
        parameters.wrong("rope_type", f"is {parameters.value('rope_type')!r}, supported: 'default'")
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        parameters.wrong("partial_rotary_factor", "must be 1: this decoder rotates whole heads")
    theta = parameters.number("rope_theta", 500000.0)
    if unknown := parameters.unread():
        _log.warning("config.json: unknown keys ignored: %s", ", ".join(unknown))
    return keys.number("rope_theta", theta)


def _eos_token_ids(path: Path, keys: Keys) -> tuple[int, ...]:
    """All ids that end a completion, of config.json and generation_config.json, without repetition."""
    values = [keys.value("eos_token_id")]
    generation = path / "generation_config.json"
    if generation.exists():
        values.append(read_json(generation).get("eos_token_id"))
    return tuple(dict.fromkeys(token for value in values for token in _token_ids(keys, value)))


def _token_ids(keys: Keys, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(type(token) is int and token >= 0 for token in ids):
        return ids
    keys.wrong("eos_token_id", f"must be a token id or a list of them, got {value!r}")
    return []
