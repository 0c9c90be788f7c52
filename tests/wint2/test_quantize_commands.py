"""`wint2 quantize`, `inspect` and `eval` as a person types them, and what they say to wrong input."""

import json

import pytest
import torch

from tests.tiny import make_tiny_model
from wint2.cli import main

FEW = [
    "--num-windows",
    "4",
    "--window",
    "32",
    "--held-out-windows",
    "1",
    "--wint4-end-layer",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("full") / "model", quantized=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("In the beginning God created the heaven and the earth. " * 40)
    return path


@pytest.fixture(scope="module")
def quantized(full, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "model"
    main(["quantize", str(full), str(output), "--calibration", str(text), *FEW])
    return output


def fails(capsys, *words):
    """The one line on standard error, and the exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1], end.value.code


def test_quantize_says_what_it_will_do_and_what_came_of_it(full, text, tmp_path, capsys):
    main(["quantize", str(full), str(tmp_path / "out"), "--calibration", str(text), *FEW])
    out, err = capsys.readouterr()
    assert "memory       at most" in out
    assert "memory       peak" in out
    assert "experts WINT4 in layers 0-2; attention and dense wint8" in out
    assert "wint4      errors fed back" in out
    assert "stream     self_attn.o_proj fitted" in out
    assert "top-1 agreement" in out
    assert "warning: layer 1" in err
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["recipe"]["low"] == "wint2"


def test_inspect_tells_formats_bits_order_and_sums(quantized, capsys):
    main(["inspect", str(quantized), "--verify", "--tensors"])
    out = capsys.readouterr().out
    assert "experts         wint4     1-2" in out
    assert "K order    no WINT2 weights" in out
    assert "checksums  4 files, all as written" in out
    assert "ernie.layers.2.mlp.experts.3.down_proj.quant_weight" in out


def test_inspect_finds_a_damaged_file(quantized, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(quantized, tmp_path / "copy")
    shard = copy / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    line, code = fails(capsys, "inspect", copy, "--verify")
    assert "model-00002-of-00004.safetensors: does not match its sum" in line
    assert code == 1


def test_eval_of_a_model_against_itself(full, text, capsys):
    main(
        [
            "eval",
            str(full),
            "--text",
            str(text),
            "--reference",
            str(full),
            "--num-windows",
            "2",
            "--window",
            "32",
        ]
    )
    figures = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert figures["num tokens"] == "62"
    assert figures["perplexity"] == figures["reference perplexity"]
    assert (figures["kl"], figures["top1 agreement"]) == ("0.0000", "1.0000")


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(tmp_path, text, capsys):
    from safetensors.torch import load_file, save_file

    path = make_tiny_model(tmp_path / "model", quantized=False)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].zero_()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    main(["eval", str(path), "--text", str(text), "--num-windows", "1", "--window", "16"])
    line = capsys.readouterr().out.splitlines()[1]
    assert float(line.removeprefix("perplexity")) == pytest.approx(300, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-windows", "0"], "--num-windows"),
        (["--effort", "lazy"], "--effort"),
        (["--wint4-end-layer", "9"], "WINT4 up to layer 9, but the last layer is 2"),
        (["--window", "10000000"], "one window needs 10000000"),
        (["--calibration", "/nowhere.txt"], "/nowhere.txt: No such file or directory"),
    ],
)
def test_wrong_options_are_one_line(full, tmp_path, capsys, options, message):
    line, code = fails(capsys, "quantize", full, tmp_path / "out", "--device", "cpu", *options)
    assert message in line
    assert code in (1, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(full, tmp_path, capsys):
    assert fails(capsys, "quantize", full, tmp_path / "out", "--device", "cuda") == (
        "error: --device cuda: no CUDA device is available",
        2,
    )


def test_another_architecture_is_one_line(full, tmp_path, capsys):
    import shutil

    path = shutil.copytree(full, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    line, code = fails(capsys, "quantize", path, tmp_path / "out")
    assert "gpt2" in line
    assert code == 2


def test_a_calibration_text_that_is_no_text_is_one_line(full, tmp_path, capsys):
    path = tmp_path / "text.bin"
    path.write_bytes(b"\xff\xfe\x00")
    line, code = fails(capsys, "quantize", full, tmp_path / "out", "--calibration", path)
    assert "not UTF-8 text (invalid start byte at byte 0)" in line
    assert code == 2
