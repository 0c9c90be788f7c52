"""config.json: published files' keys are known, what is wrong is said at once, what is unknown is told."""

import contextlib
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_worker.config import QuantizationConfig
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import ConfigError
from tests.published_configs import PUBLISHED
from tests.tiny import CONFIG, QUANTIZATION_CONFIG

WINT2 = {"quantization_config": QUANTIZATION_CONFIG}
MIX = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(folder)


def read_block(folder, **block):
    return read(folder, CONFIG | {"quantization_config": block}).quantization


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_hold_nothing_unknown(tmp_path, name, caplog):
    config = read(tmp_path, PUBLISHED[name])
    assert config.num_hidden_layers == PUBLISHED[name]["num_hidden_layers"]
    assert not caplog.records


def test_unknown_keys_are_reported_by_name_and_place(tmp_path, caplog):
    block = QUANTIZATION_CONFIG | {"frobnicate": 1}
    read(tmp_path, CONFIG | {"quantization_config": block, "qk_clip": 3, "use_something": True})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "config.json: unknown keys ignored: quantization_config.frobnicate" in caplog.text
    assert "config.json: unknown keys ignored: qk_clip, use_something" in caplog.text


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    wrong = {"hidden_size": "64", "moe_k": 0, "use_bias": True, "rms_norm_eps": -1, "layer_types": 3}
    block = QUANTIZATION_CONFIG | {"dense_quant_type": "fp4"}
    config = CONFIG | wrong | {"quantization_config": block}
    del config["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, config)
    assert set(str(caught.value).splitlines()) == {
        "config.json: hidden_size must be an integer from 1 to 2147483647, got '64'",
        "config.json: moe_k must be an integer from 1 to 2147483647, got 0",
        "config.json: use_bias is True; this decoder computes only False",
        "config.json: rms_norm_eps must be a number above 0, got -1",
        "config.json: layer_types must be 'full_attention' for every layer",
        "config.json: vocab_size is missing",
        "config.json: quantization_config.dense_quant_type is 'fp4'; supported: wint2, wint2t, wint4, wint8",
    }


def test_the_published_wint2_block(tmp_path):
    expected = QuantizationConfig("wint8", "wint4", "wint2", 1, 64, wint2_end_layer=2)
    assert read(tmp_path, CONFIG | WINT2).quantization == expected
    first_name = {"quantization": "wint2", "dense_quant_config": "wint4"}
    assert read_block(tmp_path, **first_name) == QuantizationConfig("wint4", "wint4", "wint2", 6, 64)


def test_experts_beyond_the_end_of_wint2_are_wint4_again_and_the_k_order_is_read(tmp_path):
    sections = {
        "moe_w4_quant_config": {"quant_end_layer": 0},
        "moe_w2_quant_config": {"quant_end_layer": 1, "k_order": "natural"},
    }
    found = read_block(tmp_path, quantization="wint2", moe_quant_config=sections)
    assert [found.expert_format(layer) for layer in range(4)] == ["wint4", "wint2", "wint4", "wint4"]
    assert found.k_order == "natural"
    sections["moe_w2_quant_config"] = {"k_order": "reversed"}
    with pytest.raises(ConfigError, match="k_order is 'reversed'; supported: shuffled, natural"):
        read_block(tmp_path, quantization="wint2", moe_quant_config=sections)


NONE = QuantizationConfig()
BOTH = QuantizationConfig("wint8", "wint4", "wint4")


@pytest.mark.parametrize(
    ("top", "block", "expected"),
    [
        ({}, {}, BOTH),
        ({}, {"is_quantized": True}, BOTH),
        ({}, {"is_quantized": False}, NONE),
        ({"is_quantized": False}, {"is_quantized": True}, NONE),
        ({"is_quantized": True}, {"is_quantized": False}, BOTH),
        ({}, {"is_moe_quantized": True}, QuantizationConfig("none", "wint4", "wint4")),
        ({}, {"is_moe_quantized": False}, NONE),
        ({}, {"kv_cache_quant_type": "int8"}, NONE),
        ({}, {"kv_cache_quant_type": "int8", "is_quantized": True}, BOTH),
    ],
)
def test_whether_the_files_are_quantized_already(tmp_path, caplog, top, block, expected):
    assert read(tmp_path, CONFIG | top | {"quantization_config": MIX | block}).quantization == expected
    assert ("nothing is quantized while loading" in caplog.text) == (expected != BOTH)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "quantization_config.quantization is missing"),
        ({"quantization": "w4a8"}, "is 'w4a8'; supported: wint2, wint2t, mix_quant, wint4, wint8"),
        (MIX | {"is_permuted": False}, "quantization_config.is_permuted is False; files of True are read"),
        (MIX | {"has_zero_point": True}, "quantization_config.has_zero_point is True; files of False are"),
        (MIX | {"is_quantized": 1}, "quantization_config.is_quantized must be true or false, got 1"),
        (
            {"quantization": "wint2", "moe_quant_config": {"moe_w2_quant_config": {"quant_group_size": 128}}},
            "moe_quant_config.moe_w2_quant_config.quant_group_size is 128; files of 0 or 64 are read",
        ),
        ({"quantization": "wint2", "moe_quant_config": []}, "moe_quant_config must be an object, got"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, block, message):
    with pytest.raises(ConfigError) as caught:
        read_block(tmp_path, **(block or {"dense_quant_type": "wint8"}))
    assert message in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*CONFIG, *QUANTIZATION_CONFIG, "quantization_config", "moe_quant_config", "rope_parameters"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
    st.none() | st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
)
def test_any_config_is_read_or_refused(tmp_path, changes, block):
    config = CONFIG | changes | ({} if block is None else {"quantization_config": block})
    with contextlib.suppress(ConfigError):
        assert read(tmp_path, config).num_hidden_layers > 0


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"a": ' + "1" * 5000 + "}", " " * 2**20 + "{}"])
def test_a_file_that_is_no_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json: .*") as caught:
        read_model_config(tmp_path)
    assert len(str(caught.value)) < 500
