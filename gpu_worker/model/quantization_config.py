"""The `quantization_config` block of config.json, in the grammar of FastDeploy's WINT2 and mix_quant readers.

    {"quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2", "moe_quant_config": {
        "quant_type": "w4w2",
        "moe_w4_quant_config": {"quant_type": "wint4", ..., "quant_start_layer": 0, "quant_end_layer": 6},
        "moe_w2_quant_config": {"quant_type": "wint2", ..., "quant_group_size": 64, "quant_end_layer": 53}}}

Only `moe_w4_quant_config.quant_end_layer` decides where WINT2 begins, as in FastDeploy. Where it ends,
FastDeploy does not ask; experts beyond an end that lies above the beginning are those of the first layers
again. `k_order` of the WINT2 section is our quantizer's word. The block describes the files only if they are
quantized:

    config.json's own is_quantized, else the block's      both or neither
    else the block's is_moe_quantized                     the experts, or nothing
    else                                                  both, unless the block has a kv_cache_quant_type
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast, get_args

from cuda_kernels.formats.layout import KOrder
from gpu_worker.config import QuantFormat, QuantizationConfig
from gpu_worker.model.json_keys import Keys

_log = logging.getLogger(__name__)

_FORMATS = ("wint2", "wint2t", "wint4", "wint8")
# Values that describe what is read; files of any other would be read wrongly.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "is_permuted": (True,),
    "has_zero_point": (False,),
    "dense_quant_granularity": ("per_channel",),
    "quant_granularity": ("per_channel", "pp_acc"),
    "quant_group_size": (0, 64),
}
# Of other things than the weights' bytes: where the next layers begin, other models, activations.
_WITHOUT_EFFECT = frozenset(
    (
        "moe_quant_type",
        "is_channel_wise",
        "image_moe_quant_type",
        "hadamard_block_size",
        "quant_start_layer",
        "quant_end_layer",
        "quant_type",
        "kv_cache_quant_type",
    )
)


def read_quantization_config(config: Keys) -> QuantizationConfig:
    """Which projections are stored how; all "none" for an absent block, or one of files yet to be quantized.

    Notes its problems in `config`.
    """
    if "quantization_config" not in config:
        return QuantizationConfig()
    keys = config.section("quantization_config")
    read = _read_formats(keys)
    dense, experts = _are_quantized(config, keys)
    if not (dense and experts):
        _log.warning(
            "config.json: by its is_quantized %s in full precision; nothing is quantized while loading, "
            "`wint2 quantize IN OUT` does it once",
            "attention and dense layers are" if experts else "the weights are",
        )
    none = QuantizationConfig()
    if not experts:
        read = replace(read, experts_low=none.experts_low, experts_high=none.experts_high)
    return read if dense else replace(read, dense=none.dense)


def _are_quantized(config: Keys, keys: Keys) -> tuple[bool, bool]:
    """Whether the files hold quantized dense layers, and experts."""
    for place in (config, keys):
        if "is_quantized" in place:
            return (place.flag("is_quantized"),) * 2
    if "is_moe_quantized" in keys:
        return False, keys.flag("is_moe_quantized")
    return ("kv_cache_quant_type" not in keys,) * 2


def _read_formats(keys: Keys) -> QuantizationConfig:
    quantization = keys.text("quantization")
    if quantization in ("wint2", "wint2t"):
        found = _wint2(keys, quantization)
    elif quantization == "mix_quant":
        found = _uniform(keys, "moe_quant_type", "dense_quant_type")
    elif quantization in _FORMATS:
        found = _uniform(keys, "quantization", "quantization")
    else:
        supported = "supported: wint2, wint2t, mix_quant, wint4, wint8"
        keys.wrong("quantization", f"is {quantization!r}; {supported}")
        found = QuantizationConfig()
    _check(keys)
    return found


def _wint2(keys: Keys, low_format: str) -> QuantizationConfig:
    """A missing `dense_quant_type` means WINT8, its first name was `dense_quant_config`."""
    moe = keys.section("moe_quant_config")
    low, high = moe.section("moe_w4_quant_config"), moe.section("moe_w2_quant_config")
    dense_key = "dense_quant_config" if "dense_quant_config" in keys else "dense_quant_type"
    begin = low.size("quant_end_layer", 6, minimum=-1)
    end = high.size("quant_end_layer", 0, minimum=-1)
    found = QuantizationConfig(
        dense=_format(keys, dense_key, "wint8"),
        experts_low=_format(low, "quant_type", "wint4"),
        experts_high=_format(high, "quant_type", low_format),
        wint4_end_layer=begin,
        wint2_end_layer=end if end > begin else None,
        group_size=high.size("quant_group_size", 64, minimum=0) or 64,
        k_order=_k_order(high),
    )
    for section in (moe, low, high):
        _check(section)
    return found


def _k_order(keys: Keys) -> KOrder | None:
    name = keys.text("k_order", "")
    if name and name not in get_args(KOrder):
        keys.wrong("k_order", f"is {name!r}; supported: {', '.join(get_args(KOrder))}")
    return cast(KOrder, name) if name in get_args(KOrder) else None


def _uniform(keys: Keys, expert_key: str, dense_key: str) -> QuantizationConfig:
    experts = _format(keys, expert_key, "none")
    return QuantizationConfig(_format(keys, dense_key, "none"), experts, experts)


def _format(keys: Keys, key: str, default: str) -> QuantFormat:
    name = keys.text(key, default)
    if name not in (*_FORMATS, "none"):
        keys.wrong(key, f"is {name!r}; supported: {', '.join(_FORMATS)}")
    return cast(QuantFormat, name)


def _check(keys: Keys) -> None:
    """Refuses what would be read wrongly, and reports what nobody knows."""
    for key, supported in _SUPPORTED.items():
        if key in keys and keys.value(key) not in supported:
            wanted = " or ".join(map(repr, supported))
            keys.wrong(key, f"is {keys.value(key)!r}; files of {wanted} are read")
    known = {keys.name(key) for key in (*_WITHOUT_EFFECT, "is_quantized", "is_moe_quantized")}
    if unknown := [name for name in keys.unread() if name not in known]:
        _log.warning("config.json: unknown keys ignored: %s", ", ".join(unknown))
