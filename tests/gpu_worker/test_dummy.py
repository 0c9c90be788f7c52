"""Made-up weights: the sizes that config.json implies, and a model that runs without a checkpoint."""

import json
from collections import Counter

import pytest
import torch

from cuda_kernels.packing import SHORT_FRACTION_BITS, integer_constants
from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.llm import LLM
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.dummy import DummyFile, plan_dummy
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.sampling_params import SamplingParams
from tests.tiny import CONFIG, QUANTIZATION_CONFIG, make_tiny_model

ERNIE_300B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "moe_num_experts": 64,
    "moe_k": 8,
    "moe_intermediate_size": 3584,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "moe_layer_end_index": 53,
    "quantization_config": {
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "quantization": "wint2",
        "moe_quant_config": {
            "moe_w4_quant_config": {"quant_type": "wint4", "quant_start_layer": 0, "quant_end_layer": 6},
            "moe_w2_quant_config": {"quant_type": "wint2", "quant_group_size": 64, "quant_start_layer": 7},
        },
    },
}


def write_config(path, **overrides):
    (path / "config.json").write_text(json.dumps(CONFIG | overrides))
    return path


def test_the_300b_model_takes_the_bytes_of_its_specification(tmp_path):
    plan = plan_dummy(read_model_config(write_config(tmp_path, **ERNIE_300B)))
    stored = Counter()
    for weight in plan.weights():
        stored[weight.format] += weight.stored_bytes
    gigabytes = {name: round(size / 1e9, 2) for name, size in stored.items()}
    assert gigabytes == {"wint2": 68.77, "wint4": 11.28, "wint8": 10.27, "none": 3.50}
    assert round(plan.stored_bytes / 1e9, 1) == 93.8


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": QUANTIZATION_CONFIG}])
def test_a_dummy_plan_has_the_sizes_of_the_checkpoint(tmp_path, quantized):
    config = read_model_config(write_config(tmp_path, **quantized, moe_num_shared_experts=0))
    real = make_tiny_model(tmp_path / "real", quantized=bool(quantized), moe_num_shared_experts=0)
    size = (real / "model.safetensors").stat().st_size
    assert 0 < size - plan_dummy(config).stored_bytes < 16_000  # the header


def test_a_dummy_model_runs_and_is_the_same_every_time(tmp_path):
    write_config(tmp_path, quantization_config=QUANTIZATION_CONFIG)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    completions = []
    for _ in range(2):
        llm = LLM(tmp_path, load_choices="dummy", skip_tokenizer_init=True, num_kv_blocks=8)
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        completions.append(output.outputs.token_ids)
    assert completions[0] == completions[1]
    assert len(completions[0]) == 8


def test_dummy_weights_have_ordinary_magnitudes(tmp_path):
    config = read_model_config(write_config(tmp_path, quantization_config=QUANTIZATION_CONFIG))
    plan = plan_dummy(config)
    for mlp in (plan.layers[1].mlp.experts[0], plan.layers[2].mlp.experts[3], plan.layers[0].mlp):
        assert 0.001 < mlp.up_gate.dense().float().std() < 0.2
    assert torch.equal(plan.final_norm.dense(), torch.ones(64, dtype=torch.bfloat16))


def test_dummy_codes_lie_on_the_quantizer_s_grid(tmp_path):
    file = DummyFile(tmp_path, torch.device("cpu"))
    scale, zp = (
        file.read(StoredTensor(f"up_gate_proj.{leaf}", file, torch.float32, (500,), 0))
        for leaf in ("code_scale", "code_zp")
    )
    assert all(torch.equal(codes * 128, (codes * 128).round()) for codes in (scale, zp))
    assert integer_constants(scale, zp, SHORT_FRACTION_BITS)[2].all()


def test_an_unknown_load_format_is_refused(tmp_path):
    with pytest.raises(EngineArgsError, match="must be auto or dummy, got 'pt'"):
        LLM(tmp_path, load_format="pt")
