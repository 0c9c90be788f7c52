"""What a model takes, told before anything is read."""

import pytest
import torch

from gpu_worker.engine.devices import DeviceChoice
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.preflight import check_weights_fit, footprint
from gpu_worker.model.config_reader import read_model_config
from tests.gpu_worker.test_dummy import ERNIE_300B, write_config
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
    assert "smallest GPU: 100 GiB" in text


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
    gib = 2**30
    assert found.largest_model_len(80 * gib) == 0
    assert found.largest_model_len(100 * gib) == (100 * gib - found.weight_bytes - 2 * gib) // 221184
    assert found.largest_model_len(141 * gib) == 131072
    smallest = found.smallest_gpu_gib(0.9)
    assert found.largest_model_len(int(smallest * 0.9 * gib)) > 0
    assert found.largest_model_len(int((smallest - 1) * 0.9 * gib)) == 0


def test_a_model_that_cannot_fit_is_refused_with_numbers(ernie_300b, monkeypatch):
    monkeypatch.setattr("gpu_worker.engine.preflight.available_cpu_bytes", lambda: 32 * 2**30)
    with pytest.raises(EngineArgsError, match=r"weights need 87\.4 GiB, 32\.0 of memory are available"):
        check_weights_fit(read_model_config(ernie_300b), CPU, 0.9)


def test_a_gpu_too_small_for_a_model_is_told_how_many_are_enough(ernie_300b, monkeypatch):
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    gpu = DeviceChoice(torch.device("cuda", 0), "pretended")
    config = read_model_config(ernie_300b)
    wanted = r"need 87\.4 GiB, 72\.0 of this GPU's 80\.0 may be used: use --tensor-parallel-size 2"
    with pytest.raises(EngineArgsError, match=wanted):
        check_weights_fit(config, gpu, 0.9)
    check_weights_fit(config, gpu, 0.9, num_ranks=2)
