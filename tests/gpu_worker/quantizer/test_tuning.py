"""End-to-end tuning brings a quantized checkpoint nearer to its original, in the same bits."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.quantizer import memory
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.recipe import Recipe
from tests.gpu_worker.quantizer.quantizing import quantize, tokens
from tests.gpu_worker.test_families import EXPERTS, save_random
from tests.tiny import make_tiny_model

UNTUNED = Recipe(1, effort="fast", min_rows=16, correct_experts=False, correct_dense=False)
STEPS = 12
TUNED = dataclasses.replace(UNTUNED, tune_steps=STEPS)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("full") / "model", quantized=False)


@pytest.fixture(scope="module")
def pair(full, tmp_path_factory):
    """The directories and reports of one model without and with tuning."""
    directory = tmp_path_factory.mktemp("tuned")
    windows_ST = tokens(2, 64, seed=1)
    outputs = directory / "untuned", directory / "tuned"
    reports = [
        quantize(full, output, recipe, held_out_ST=windows_ST, tuning_ST=windows_ST)
        for output, recipe in zip(outputs, (UNTUNED, TUNED), strict=True)
    ]
    return outputs, reports


def test_the_files_come_nearer_to_the_original(pair):
    untuned, tuned = (report["evaluation"]["kl"] for report in pair[1])
    assert tuned < 0.9 * untuned


def test_the_report_has_a_loss_a_step(pair):
    assert [len(report["tuning"]) for report in pair[1]] == [0, STEPS]
    assert f"{STEPS} steps, loss" in (pair[0][1] / "report.html").read_text()


def test_no_code_changes_and_no_bit_is_added(pair):
    moved = set()
    for path in pair[0][0].glob("*.safetensors"):
        before, after = load_file(path), load_file(pair[0][1] / path.name)
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
            n: (t.shape, t.dtype) for n, t in after.items()
        }
        moved |= {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    of_experts = {name.rsplit(".", 1)[1] for name in moved if ".experts." in name}
    assert of_experts == {"super_scales", "weight_scale"}
    assert not any(part in name for name in moved for part in (".gate.", "embed_tokens"))
    assert any("layernorm" in name for name in moved)
    assert any("o_proj" in name for name in moved)


def test_a_family_with_norms_of_its_own_is_tuned(tmp_path):
    source = save_random(tmp_path / "full", "qwen3_moe", EXPERTS | {"num_experts": 3, "num_hidden_layers": 1})
    recipe = dataclasses.replace(UNTUNED, wint4_end_layer=-1, min_rows=8, tune_steps=3)
    report = quantize(source, tmp_path / "out", recipe, calibration=tokens(2, 24, vocab_size=120))
    assert len(report["tuning"]) == 3


def test_a_model_too_large_to_hold_twice_is_refused_before_anything_is_written(full, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1000)
    with pytest.raises(QuantizeError, match=r"tuning holds both models .* [\d,]+ bytes, but cpu has 1,000"):
        quantize(full, tmp_path / "out", TUNED)
    assert not (tmp_path / "out.partial").exists()
