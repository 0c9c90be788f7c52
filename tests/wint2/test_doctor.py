"""`wint2 doctor --model`: what a load would find, told from the headers alone."""

import json

import pytest

from tests.tiny import make_tiny_model
from wint2.cli import main


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "model", quantized=True)


def lines(capsys, model, code=None):
    """What is said of the model; `code` is the exit code, if it is not 0."""
    if code is None:
        main(["doctor", "--model", str(model)])
    else:
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--model", str(model)])
        assert caught.value.code == code
    return [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "model"]


def test_a_whole_model(model, capsys):
    found, note = lines(capsys, model)
    formats = "quantization experts of layers 0-1 wint4, 2-2 wint2; dense wint8"
    assert found == f"ok    model          ernie4_5_moe, 0.00 GiB, 4 experts, {formats}"
    assert "shared experts: 4 projections are stored as full precision, config.json says wint8" in note


def test_config_weights_and_tokenizer_are_judged_at_once(model, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 4, "moe_layer_end_index": 3})
    )
    (model / "tokenizer_config.json").write_text('{"a": 1,}')
    found = lines(capsys, model, code=1)
    assert all(line.startswith("FAIL") for line in found)
    assert "ernie.layers.3.input_layernorm.weight: missing" in found[0]
    assert "tokenizer_config.json: not valid JSON" in found[-1]


def test_a_truncated_file(model, capsys):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (line,) = lines(capsys, model, code=1)
    assert "model.safetensors: the file is truncated" in line
