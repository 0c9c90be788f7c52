"""config.json and generation_config.json to a ModelConfig, each problem named by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_worker.config import ModelConfig
from gpu_worker.model.families import FAMILIES
from gpu_worker.model.families.ernie import ERNIE
from gpu_worker.model.families.family import Family
from gpu_worker.model.json_keys import Keys, read_json
from gpu_worker.model.quantization_config import read_quantization_config

_LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "deepseek_v32")


def read_model_config(path: Path) -> ModelConfig:
    """The model in folder `path`. Raises ConfigError."""
    keys = Keys(read_json(path / "config.json"))
    family = _family(keys)
    _check_supported(keys, family)
    config = _config(path, keys, family)
    _check_consistent(keys, config)
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
        "quantization": read_quantization_config(keys.section("quantization_config")),
    }
    return ModelConfig(**shared | family.fields(keys))


def _check_supported(keys: Keys, family: Family) -> None:
    for key, supported in {"hidden_act": ("silu",), **family.supported}.items():
        if key in keys and keys.value(key) not in supported:
            wanted = " or ".join(map(repr, supported))
            raise keys.error(key, f"is {keys.value(key)!r}; this decoder computes only {wanted}")
    if set(keys.value("layer_types") or ()) - {"full_attention"}:
        raise keys.error("layer_types", "must be 'full_attention' for every layer")


def _check_consistent(keys: Keys, config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        message = f"({config.num_key_value_heads}) does not divide {config.num_attention_heads} query heads"
        raise keys.error("num_key_value_heads", message)
    if config.head_dim % 2:
        raise keys.error("head_dim", f"must be even for rotary embedding, got {config.head_dim}")
    if config.num_experts_per_token > config.num_experts:
        raise keys.error("moe_k", f"({config.num_experts_per_token}) exceeds {config.num_experts} experts")


def _rope_theta(keys: Keys) -> float:
    """`rope_theta`, or `rope_parameters.rope_theta` as transformers 5 writes it."""
    parameters = keys.section("rope_parameters")
    if parameters.text("rope_type", "default") != "default":
        raise parameters.error("rope_type", f"is {parameters.value('rope_type')!r}, supported: 'default'")
    return keys.number("rope_theta", parameters.number("rope_theta", 500000.0))


def _eos_token_ids(path: Path, keys: Keys) -> tuple[int, ...]:
    """All ids that end a completion, of config.json and generation_config.json, without repetition."""
    found = _token_ids(keys)
    generation = path / "generation_config.json"
    if generation.exists():
        found += _token_ids(Keys(read_json(generation)))
    return tuple(dict.fromkeys(found))


def _token_ids(keys: Keys) -> list[int]:
    value = keys.value("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise keys.error("eos_token_id", f"must be a token id or a list of them, got {value!r}")
    return ids
