"""`wint2 quantize` as a process: killed and resumed, bounded in memory, out of disk."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer import memory
from gpu_worker.quantizer.recipe import Recipe
from tests.fakes_model import model_config
from tests.gpu_worker.quantizer.quantizing import PLAIN, quantize, tokens
from tests.tiny import make_tiny_model

PROGRAM = """
import resource, sys
from pathlib import Path
from gpu_worker.quantizer import memory
from tests.gpu_worker.quantizer.quantizing import PLAIN, quantize, tokens
{before}
begin = memory.peak_bytes()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), PLAIN, calibration={calibration})
print(memory.peak_bytes() - begin)
"""
SLOW = "import time, gpu_worker.quantizer.pipeline as p\nwrite = p._Run._save\n" + (
    "p._Run._save = lambda run: (write(run), time.sleep(0.3))"
)
# A write beyond the limit fails as one on a full disk does, with another errno.
SMALL_DISK = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
"""


def start(
    source: Path, output: Path, before: str = "", calibration: str = "tokens()"
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(before=before, calibration=calibration),
        str(source),
        str(output),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def finished_layers(output: Path) -> int:
    path = output.with_name(output.name + ".partial") / "progress.json"
    return len(json.loads(path.read_text())["layers"]) if path.exists() else -1


def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(tmp_path):
    source = make_tiny_model(tmp_path / "model", quantized=False)
    output = tmp_path / "out"
    with start(source, output, SLOW) as process:
        while finished_layers(output) < 1:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    first = output.with_name("out.partial") / "model-00002-of-00004.safetensors"
    before = first.stat().st_mtime_ns
    (output.with_name("out.partial") / "model-00003-of-00004.partial").write_bytes(b"half a shard")
    quantize(source, output, PLAIN)
    assert (output / first.name).stat().st_mtime_ns == before
    quantize(source, tmp_path / "uninterrupted", PLAIN)
    names = [path.name for path in (tmp_path / "uninterrupted").glob("model*")]
    assert len(names) == 5
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()
    assert not list(output.glob("*.partial"))


def test_memory_is_bounded_by_one_expert_and_not_by_the_model(tmp_path):
    sizes = {"moe_num_experts": 40, "hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256}
    source = make_tiny_model(tmp_path / "model", quantized=False, moe_layer_start_index=0, **sizes)
    with start(source, tmp_path / "out") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    bound = memory.bound_bytes(read_model_config(source), PLAIN, tokens().numel())
    assert int(out) < bound < (source / "model.safetensors").stat().st_size / 2


def test_the_bound_of_the_300b_model_leaves_room_on_a_64_gb_machine():
    config = dataclasses.replace(
        model_config(103424),
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=54,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=64,
        moe_intermediate_size=3584,
        num_shared_experts=0,
        moe_layer_start_index=3,
        moe_layer_end_index=53,
    )
    assert memory.bound_bytes(config, Recipe(wint4_end_layer=6), 64 * 512) < 62e9
    assert memory.output_bytes(config, Recipe(wint4_end_layer=6)) == pytest.approx(93.8e9, rel=0.05)


def test_a_disk_that_fills_up_is_one_line_and_the_run_can_go_on(tmp_path):
    source = make_tiny_model(tmp_path / "model", quantized=False)
    with start(source, tmp_path / "out", SMALL_DISK, "tokens(16, 128)") as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert "QuantizeError" in err.splitlines()[-1]
    assert "could not be written" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", PLAIN, calibration=tokens(16, 128))
