"""A tiny checkpoint through the quantizer: what is written, and what is refused."""

import json
import shutil

import pytest
import torch

from cuda_kernels.formats.layout import FormatError
from gpu_worker.model.errors import CheckpointError
from gpu_worker.quantizer import checksums, memory, pipeline, stages
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.evaluate import evaluate
from gpu_worker.quantizer.recipe import Recipe
from tests.gpu_worker.quantizer.quantizing import quantize, source, tokens
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("full") / "model", quantized=False)


@pytest.fixture(scope="module")
def quantized(full, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "model"
    recipe = Recipe(wint4_end_layer=1, effort="fast", min_rows=16)
    report = quantize(full, output, recipe, held_out_ST=tokens(2, seed=1))
    return output, report


def test_the_recipe_is_what_the_files_hold(quantized):
    layers = source(quantized[0]).plan.layers
    assert [layer.qkv.format for layer in layers] == ["wint8"] * 3
    assert layers[0].mlp.down.format == "wint8"
    assert [layer.mlp.experts[0].down.format for layer in layers[1:]] == ["wint4", "wint2"]
    assert [layer.mlp.shared.up_gate.format for layer in layers[1:]] == ["wint8", "wint8"]


def test_config_records_the_recipe_in_the_seeds_words(quantized, full):
    config = json.loads((quantized[0] / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == json.loads((full / "config.json").read_text())
    assert (block["quantization"], block["dense_quant_type"]) == ("wint2", "wint8")
    assert block["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"] == 1
    assert block["moe_quant_config"]["moe_w2_quant_config"]["quant_group_size"] == 64


def test_everything_that_serves_is_there_and_nothing_else(quantized):
    names = {path.name for path in quantized[0].iterdir()}
    shards = {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)}
    assert names == shards | {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "quantization_report.json",
        "report.html",
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not quantized[0].with_name("model.partial").exists()


def test_checksums_notice_a_changed_bit(quantized, tmp_path):
    copy = shutil.copytree(quantized[0], tmp_path / "copy")
    assert checksums.verify(copy) == []
    shard = copy / "model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (copy / "model-00003-of-00004.safetensors").unlink()
    assert checksums.verify(copy) == [
        "model-00002-of-00004.safetensors: does not match its sum",
        "model-00003-of-00004.safetensors: missing",
    ]


def test_the_report_measures_the_files_themselves(quantized, full):
    output, report = quantized
    assert json.loads((output / "quantization_report.json").read_text()) == report
    with torch.inference_mode():
        found = evaluate(source(output), tokens(2, seed=1), source(full))
    assert report["evaluation"]["perplexity"] == pytest.approx(found.perplexity)
    assert 0 < found.kl < 3
    low = [p for p in report["layers"][2]["projections"] if ".experts." in p["name"]]
    assert len(low) == 8
    assert all(0 < p["output_error"] < 0.3 for p in low)


def test_the_page_needs_nothing_else_and_is_readable_in_the_dark(quantized):
    page = (quantized[0] / "report.html").read_text()
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 6
    assert "top-1 agreement" in page
    assert "$" not in page


def test_corrections_bring_the_stream_nearer(full, tmp_path):
    errors = []
    for correct in (True, False):
        recipe = Recipe(1, effort="fast", min_rows=16, correct_experts=correct, correct_dense=correct)
        report = quantize(full, tmp_path / str(correct), recipe, calibration=tokens(16, 64))
        errors.append(report["layers"][-1]["stream_error"])
    assert errors[0] < errors[1]


def test_an_expert_that_no_token_chose_is_quantized_on_lent_tokens(tmp_path):
    path = make_tiny_model(tmp_path / "model", quantized=False)
    recipe = Recipe(wint4_end_layer=2, min_rows=64)
    report = quantize(path, tmp_path / "out", recipe, calibration=tokens(1, 8))
    assert min(report["layers"][1]["rows_per_expert"]) < 8
    assert all(p["weight_error"] < 0.5 for layer in report["layers"] for p in layer["projections"])
    notes = pipeline.html_report.starved_experts(report)
    assert "layer 1: 4 of 4 experts saw under 64 calibration tokens" in notes[0]


def test_inputs_that_are_no_multiple_of_128_are_padded(tmp_path):
    sizes = {"hidden_size": 72, "head_dim": 18, "moe_intermediate_size": 40}
    path = make_tiny_model(tmp_path / "model", quantized=False, **sizes)
    quantize(path, tmp_path / "out", Recipe(wint4_end_layer=1, effort="fast", min_rows=16))
    down = source(tmp_path / "out").plan.layers[2].mlp.experts[0].down
    assert down.num_inputs == 40
    assert down.ranks[0]["quant_weight"].shape == (32, 72)
    assert source(tmp_path / "out").linear(down).shape == (40, 72)


def test_a_zero_expert_stays_zero(tmp_path, full):
    path = shutil.copytree(full, tmp_path / "model")
    change(path, "model.layers.2.mlp.experts.1.down_proj.weight", lambda weight: weight.zero_())
    quantize(path, tmp_path / "out", Recipe(wint4_end_layer=2, correct_experts=False))
    out = source(tmp_path / "out")
    assert (out.linear(out.plan.layers[2].mlp.experts[1].down) == 0).all()


def test_wint2t_files_read_back(full, tmp_path):
    report = quantize(full, tmp_path / "out", Recipe(1, low="wint2t", effort="fast", min_rows=16))
    assert source(tmp_path / "out").plan.layers[2].mlp.experts[0].down.format == "wint2t"
    errors = [p["weight_error"] for p in report["layers"][2]["projections"] if ".experts." in p["name"]]
    assert max(errors) < 0.3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(full, tmp_path, value):
    path = shutil.copytree(full, tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change(path, name, lambda weight: weight[3, :2].fill_(value))
    with pytest.raises(QuantizeError, match=r"layers\.1\.mlp\.experts\.2\.gate_proj: 2 of 8192 values"):
        quantize(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(path, name, edit):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_missing_shard_is_named_before_anything_is_written(quantized, full, tmp_path):
    path = shutil.copytree(full, tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "x": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: No such file"):
        quantize(path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_what_is_quantized_already_is_refused(quantized, tmp_path):
    with pytest.raises(QuantizeError, match="quantized already"):
        quantize(quantized[0], tmp_path / "out")


def test_an_output_that_exists_is_refused(full, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantizeError, match="exists already"):
        quantize(full, tmp_path / "out")


def test_wint4_beyond_the_last_layer_is_refused(full, tmp_path):
    with pytest.raises(QuantizeError, match="WINT4 up to layer 3, but the last layer is 2"):
        quantize(full, tmp_path / "out", Recipe(wint4_end_layer=3))


def test_two_bits_that_end_before_they_begin_are_refused(full, tmp_path):
    with pytest.raises(QuantizeError, match="2-bit experts end at layer 1, WINT4 goes up to layer 1: none"):
        quantize(full, tmp_path / "out", Recipe(wint4_end_layer=1, low_end_layer=1))


def test_wint4_may_follow_the_two_bits(full, tmp_path):
    quantize(full, tmp_path / "out", Recipe(wint4_end_layer=0, low_end_layer=1, effort="fast", min_rows=16))
    written = source(tmp_path / "out")
    assert [layer.mlp.experts[0].down.format for layer in written.plan.layers[1:]] == ["wint2", "wint4"]
    assert not written.plan.notes
    assert written.config.quantization.k_order == "shuffled"


def test_the_report_says_what_each_stage_left(quantized):
    report = quantized[1]
    names = [(row.format, row.stage) for row in stages.table(report["layers"])]
    wint2 = [stages.ROUNDED, stages.SEARCHED, stages.FED_BACK, stages.FITTED]
    wint4 = [stages.ROUNDED, stages.FED_BACK, stages.FITTED]
    assert names == [*(("wint2", stage) for stage in wint2), *(("wint4", stage) for stage in wint4)]
    left = {row.stage: row.up_gate for row in stages.table(report["layers"]) if row.format == "wint2"}
    assert left[stages.ROUNDED] > left[stages.SEARCHED] > left[stages.FED_BACK]
    fits = {fit.name: fit.fitted / fit.without for fit in stages.fits(report["layers"])}
    assert fits.keys() == {"self_attn.o_proj", "mlp.down_proj", "mlp.shared_experts.down_proj"}
    assert max(fits.values()) < 1.05
    page = (quantized[0] / "report.html").read_text()
    assert all(stage in page for stage in wint2[:3])


def test_too_little_disk_is_refused_with_the_numbers(full, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QuantizeError, match=r"the output needs [\d,]+ more bytes, 1,000 are free"):
        quantize(full, tmp_path / "out")


def test_an_unfinished_run_with_other_options_is_not_mixed_in(full, tmp_path):
    (tmp_path / "out.partial").mkdir()
    state = {"fingerprint": "other", "shards": {}, "layers": []}
    (tmp_path / "out.partial" / "progress.json").write_text(json.dumps(state))
    with pytest.raises(QuantizeError, match="holds an unfinished run with other options"):
        quantize(full, tmp_path / "out")


def test_progress_counts_every_weight(full, tmp_path):
    seen = []
    quantize(full, tmp_path / "out", on_progress=lambda *progress: seen.append(progress))
    names, done, totals = zip(*seen, strict=True)
    assert set(names) == {"quantizing"}
    assert list(done) == sorted(done)
    assert (
        done[-1] == totals[-1] == sum(pipeline.num_weights(source(full).config, layer) for layer in range(3))
    )


def test_the_size_is_known_beforehand(quantized, full):
    expected = memory.output_bytes(source(full).config, Recipe(wint4_end_layer=1))
    assert expected == pytest.approx(
        quantized[1]["num_bytes"], rel=0.6
    )  # padding 64 rows to 128 is not in it


def test_another_effort_is_refused(full, tmp_path):
    with pytest.raises(FormatError, match="effort"):
        quantize(full, tmp_path / "out", Recipe(effort="lazy"))
