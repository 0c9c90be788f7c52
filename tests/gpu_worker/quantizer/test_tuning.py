"""End-to-end tuning brings a quantized checkpoint nearer to its original, in the same bits."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpu_worker.quantizer import memory
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.recipe import Recipe, Tuning
from tests.gpu_worker.quantizer.quantizing import quantize, tokens
from tests.gpu_worker.test_families import EXPERTS, save_random
from tests.tiny import make_tiny_model

UNTUNED = Recipe(1, effort="fast", min_rows=16, correct_experts=False, correct_dense=False)
STEPS = 12
TUNED = dataclasses.replace(UNTUNED, tuning=Tuning(STEPS, batch=1))


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
    assert tuned < 0.95 * untuned
    assert pair[1][1]["untuned"]["kl"] == pytest.approx(untuned, rel=1e-4)


def test_the_report_has_a_loss_a_step(pair):
    assert [len(report["tuning"]) for report in pair[1]] == [0, STEPS]
    assert f"{STEPS} steps, loss" in (pair[0][1] / "report.html").read_text()


def moved(before: Path, after: Path) -> set[str]:
    """The tensors whose values differ; none may differ in shape or type."""
    names = set()
    for path in before.glob("*.safetensors"):
        old, new = load_file(path), load_file(after / path.name)
        assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
            n: (t.shape, t.dtype) for n, t in new.items()
        }
        names |= {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    return names


def test_no_code_changes_and_no_bit_is_added(pair):
    names = moved(*pair[0])
    of_experts = {name.rsplit(".", 1)[1] for name in names if ".experts." in name}
    assert of_experts == {"super_scales", "weight_scale"}
    assert not any(part in name for name in names for part in (".gate.", "embed_tokens"))
    assert any("layernorm" in name for name in names)
    assert any("o_proj" in name for name in names)


def test_experts_alone_may_move_and_learn_from_the_originals_own_text(full, pair, tmp_path):
    tuning = Tuning(3, batch=2, samples=2, rest=False)
    quantize(full, tmp_path / "out", dataclasses.replace(UNTUNED, tuning=tuning))
    names = moved(pair[0][0], tmp_path / "out")
    assert names
    assert all(".experts." in name and name.endswith(("super_scales", "weight_scale")) for name in names)


def test_a_family_with_norms_of_its_own_is_tuned(tmp_path):
    source = save_random(tmp_path / "full", "qwen3_moe", EXPERTS | {"num_experts": 3, "num_hidden_layers": 1})
    recipe = dataclasses.replace(UNTUNED, wint4_end_layer=-1, min_rows=8, tuning=Tuning(3, batch=1))
    report = quantize(source, tmp_path / "out", recipe, calibration=tokens(2, 24, vocab_size=120))
    assert len(report["tuning"]) == 3


def test_a_model_too_large_to_hold_twice_is_refused_before_anything_is_written(full, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1000)
    with pytest.raises(QuantizeError, match=r"tuning holds both models .* [\d,]+ bytes, but cpu has 1,000"):
        quantize(full, tmp_path / "out", TUNED)
    assert not (tmp_path / "out.partial").exists()
