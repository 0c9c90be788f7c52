"""The `quantization_config` block of config.json, in the grammar of FastDeploy's WINT2 and mix_quant readers.

    {"quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2", "moe_quant_config": {
        "quant_type": "w4w2",
        "moe_w4_quant_config": {"quant_type": "wint4", ..., "quant_start_layer": 0, "quant_end_layer": 6},
        "moe_w2_quant_config": {"quant_type": "wint2", ..., "quant_group_size": 64, ...}}}

Only `moe_w4_quant_config.quant_end_layer` decides where WINT2 begins, as in FastDeploy.
"""

from __future__ import annotations

import logging
from typing import cast

from gpu_worker.config import QuantFormat, QuantizationConfig
from gpu_worker.model.json_keys import Keys

_log = logging.getLogger(__name__)

_FORMATS = ("wint2", "wint2t", "wint4", "wint8")
_KNOWN = frozenset(
    (
        "quantization",
        "dense_quant_type",
        "dense_quant_config",
        "dense_quant_granularity",
        "moe_quant_type",
        "moe_quant_config",
        "kv_cache_quant_type",
        "image_moe_quant_type",
        "is_channel_wise",
        "has_zero_point",
        "is_permuted",
        "is_quantized",
        "is_moe_quantized",
        "hadamard_block_size",
    )
)
_KNOWN_MOE = frozenset(("quant_type", "moe_w4_quant_config", "moe_w2_quant_config"))
_KNOWN_RANGE = frozenset(
    ("quant_type", "quant_granularity", "quant_group_size", "quant_start_layer", "quant_end_layer")
)


def read_quantization_config(keys: Keys) -> QuantizationConfig:
    """Which projections are stored how; all "none" for an absent block. Raises ConfigError."""
    if not keys.unknown(frozenset()):
        return QuantizationConfig()
    _report_unknown(keys, _KNOWN)
    quantization = keys.text("quantization")
    if quantization in ("wint2", "wint2t"):
        return _wint2(keys, quantization)
    if quantization == "mix_quant":
        return _uniform(keys, "moe_quant_type", keys.text("dense_quant_type"))
    if quantization in _FORMATS:
        return _uniform(keys, "quantization", quantization)
    raise keys.error(
        "quantization", f"is {quantization!r}; supported: wint2, wint2t, mix_quant, wint4, wint8"
    )


def _wint2(keys: Keys, low_format: str) -> QuantizationConfig:
    """A missing `dense_quant_type` means WINT8, its first name was `dense_quant_config`."""
    moe = keys.section("moe_quant_config")
    low, high = moe.section("moe_w4_quant_config"), moe.section("moe_w2_quant_config")
    for section, known in ((moe, _KNOWN_MOE), (low, _KNOWN_RANGE), (high, _KNOWN_RANGE)):
        _report_unknown(section, known)
    dense_key = "dense_quant_config" if "dense_quant_config" in keys else "dense_quant_type"
    return QuantizationConfig(
        dense=_format(keys, dense_key, "wint8"),
        experts_low=_format(low, "quant_type", "wint4"),
        experts_high=_format(high, "quant_type", low_format),
        wint4_end_layer=low.size("quant_end_layer", 6, minimum=-1),
        group_size=high.size("quant_group_size", 64, minimum=0) or 64,
    )


def _uniform(keys: Keys, expert_key: str, dense: str) -> QuantizationConfig:
    experts = _format(keys, expert_key, "none")
    if dense not in (*_FORMATS, "none"):
        raise keys.error("dense_quant_type", f"is {dense!r}; supported: {', '.join(_FORMATS)}")
    return QuantizationConfig(cast(QuantFormat, dense), experts, experts)


def _format(keys: Keys, key: str, default: str) -> QuantFormat:
    name = keys.text(key, default)
    if name not in (*_FORMATS, "none"):
        raise keys.error(key, f"is {name!r}; supported: {', '.join(_FORMATS)}")
    return cast(QuantFormat, name)


def _report_unknown(keys: Keys, known: frozenset[str]) -> None:
    unknown = keys.unknown(known)
    if unknown:
        _log.warning("config.json: unknown keys ignored: %s", ", ".join(unknown))
