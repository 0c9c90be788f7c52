"""What a model takes, told before anything is read."""

import json
import logging
import re

import pytest
import torch

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.devices import DeviceChoice
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.memory import GIB
from gpu_worker.engine.preflight import check_fits, footprint
from gpu_worker.model.config_reader import read_model_config
from tests.bench import gpu_shapes
from tests.gpu_worker.test_dummy import ERNIE_300B, write_config
from tests.tiny import make_tiny_model
from wint2.cli import main

CPU = DeviceChoice(torch.device("cpu"), "as asked")


@pytest.fixture
def ernie_300b(tmp_path):
    return write_config(tmp_path, **ERNIE_300B)


def test_doctor_prints_the_memory_table_of_a_config(ernie_300b, capsys):
    main(["doctor", "--config", str(ernie_300b)])
    text = capsys.readouterr().out
    assert "quantization: experts of layers 0-6 wint4, 7-53 wint2; dense wint8" in text
    assert "weights                             93.82 GB     87.38 GiB" in text
    assert "experts         wint2               68.77 GB" in text
    assert "216 KiB a token, 27.00 GiB for 131072 tokens" in text
    assert "GPU of 80 GiB: too small; --tensor-parallel-size 2: context up to 131072 tokens" in text
    assert "GPU of 141 GiB: context up to 131072 tokens" in text
    assert "activations     8192 tokens          3.76 GB      3.50 GiB" in text
    assert "smallest GPU: 104 GiB" in text
    main(["doctor", "--config", str(ernie_300b), "--max-num-batched-tokens", "2048", "--max-num-seqs", "64"])
    assert "smallest GPU: 101 GiB" in capsys.readouterr().out


# GiB that weights and KV cache did not get: CUDA itself, fragments and a step of 8192 tokens.
@pytest.mark.parametrize(("shape", "layers", "measured"), [("21b", 28, 2.61), ("300b", 54, 5.58)])
def test_the_reserve_is_what_was_measured(tmp_path, shape, layers, measured):
    (tmp_path / "config.json").write_text(json.dumps(gpu_shapes.config(shape, layers)))
    found = footprint(read_model_config(tmp_path), limits=SchedulerConfig(max_num_seqs=128))
    assert found.reserve.total_bytes / GIB == pytest.approx(measured, rel=0.05)


def test_a_rank_of_two_needs_less_of_everything(ernie_300b):
    config = read_model_config(ernie_300b)
    one, two = (footprint(config, num_ranks=size) for size in (1, 2))
    assert two.weight_bytes < 0.55 * one.weight_bytes
    assert two.token_bytes == one.token_bytes // 2
    assert two.reserve.step_bytes < one.reserve.step_bytes


@pytest.mark.parametrize("quantized", [False, True])
def test_a_start_tells_the_memory_table_first(tmp_path, quantized, caplog):
    caplog.set_level(logging.INFO)
    make_tiny_model(tmp_path, quantized=quantized)
    build_engine(EngineArgs(model=tmp_path, num_kv_blocks=4))
    lines = [record.getMessage() for record in caplog.records]
    kinds = {line.split("  ")[0] for line in lines}
    assert {"experts", "attention", "embedding", "weights", "KV cache", "headroom"} <= kinds
    assert any(re.search(r"memory available: [\d.]+ GiB; context up to 2048 tokens", line) for line in lines)


def test_a_context_beyond_the_models_is_refused_before_the_weights_are_read(ernie_300b):
    with pytest.raises(
        EngineArgsError, match="max_model_len is 131073; the model was made for at most 131072"
    ):
        build_engine(EngineArgs(model=ernie_300b, max_model_len=131073))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_cache_of_levels_takes_half_and_the_scales(ernie_300b, name, capsys):
    main(["doctor", "--config", str(ernie_300b), "--kv-cache-dtype", name])
    # 54 layers of 8 heads, keys and values: 128 bytes and a scale of 4
    assert f"{54 * 8 * 2 * (128 + 4) / 1024:.4g} KiB a token, 13.92 GiB" in capsys.readouterr().out


def test_doctor_names_what_is_wrong_with_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--config", str(tmp_path)])
    assert caught.value.code == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_the_longest_context_that_fits(ernie_300b):
    found = footprint(read_model_config(ernie_300b))
    assert found.largest_model_len(80 * GIB) == 0
    assert found.largest_model_len(100 * GIB) == (100 * GIB - found.least_bytes) // 221184
    assert found.largest_model_len(141 * GIB) == 131072
    smallest = found.smallest_gpu_gib(0.9)
    assert found.largest_model_len(int(smallest * 0.9 * GIB)) > 0
    assert found.largest_model_len(int((smallest - 1) * 0.9 * GIB)) == 0


def test_a_model_that_cannot_fit_is_refused_with_numbers(ernie_300b, monkeypatch):
    monkeypatch.setattr("gpu_worker.engine.preflight.available_cpu_bytes", lambda: 32 * GIB)
    with pytest.raises(EngineArgsError, match=r"weights need 87\.4 GiB, 32\.0 of memory are available"):
        check_fits(read_model_config(ernie_300b), CPU, 0.9)


@pytest.fixture
def pretended(monkeypatch):
    """A GPU of so many GiB."""

    def make(gib):
        properties = type("Properties", (), {"total_memory": gib * GIB})
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
        return DeviceChoice(torch.device("cuda", 0), "pretended")

    return make


def test_a_gpu_too_small_for_a_model_is_told_how_many_are_enough(ernie_300b, pretended):
    config = read_model_config(ernie_300b)
    wanted = (
        r"needs 93 GiB \(weights 87\.4, CUDA 2\.1, a step of 8192 tokens 3\.5\), this GPU has 80, "
        r"of which 0\.9 may be used: use --tensor-parallel-size 2$"
    )
    with pytest.raises(EngineArgsError, match=wanted):
        check_fits(config, pretended(80), 0.9)
    check_fits(config, pretended(80), 0.9, num_ranks=2)
    with pytest.raises(EngineArgsError, match=r"this GPU has 4, of which 0\.9 .* at least 104 GiB$"):
        check_fits(config, pretended(4), 0.9)


def test_a_gpu_that_is_large_enough_gets_a_table(ernie_300b, pretended):
    lines = list(check_fits(read_model_config(ernie_300b), pretended(140), 0.9))
    assert lines[-1] == "GPU of 140.0 GiB, 0.9 of it to be used: context up to 131072 tokens"
    assert any(
        re.match(r"headroom        for the KV cache +\d+\.\d\d GB +33\.\d\d GiB", line) for line in lines
    )
    assert any(line.startswith("CUDA graphs") for line in lines)


def test_a_context_that_cannot_fit_is_refused_with_the_longest_that_does(ernie_300b, pretended):
    config, gpu = read_model_config(ernie_300b), pretended(110)
    longest = footprint(config).largest_model_len(int(110 * 0.9 * GIB))
    with pytest.raises(
        EngineArgsError, match=rf"131072 tokens need 27\.0 GiB .* use --max-model-len {longest}, or"
    ):
        check_fits(config, gpu, 0.9, wanted_len=131072)
    check_fits(config, gpu, 0.9, wanted_len=longest)


def test_a_cache_that_was_asked_for_counts(ernie_300b, pretended):
    config = read_model_config(ernie_300b)
    check_fits(config, pretended(110), 0.9, cache_bytes=10 * GIB)
    with pytest.raises(
        EngineArgsError, match=r"needs 133 GiB \(.*the KV cache asked for 40\.0\), this GPU has 110: "
    ):
        check_fits(config, pretended(110), 0.9, cache_bytes=40 * GIB)
