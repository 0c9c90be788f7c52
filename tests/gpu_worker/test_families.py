"""Every family's tiny random checkpoint, as transformers saves it, gives transformers' logits."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import ConfigError
from gpu_worker.model.families import FAMILIES
from gpu_worker.model.loader import load_model
from tests import deepseek_reference
from tests.gpu_worker.naive import NaiveRunner, greedy

COMMON = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
DOTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
LLAMA = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
MODELS = {
    "qwen3": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3, dense layers, no normalization": (
        "qwen3_moe",
        EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]},
    ),
    "qwen2": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 72}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 4}),
    "olmoe, normalized": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True}),
    "deepseek": ("deepseek", DOTS),
    "dots1, one group": ("dots1", DOTS | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}),
    "dots1, two of four groups": (
        "dots1",
        DOTS | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
}


def save_random(path, model_type, overrides):
    """A model whose weights all matter: also norms, biases and correction biases are random."""
    torch.manual_seed(0)
    if model_type == "deepseek":
        deepseek_reference.save(path, COMMON | LLAMA | overrides | {"model_type": model_type})
    else:
        config = AutoConfig.for_model(model_type, **COMMON | overrides)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    file = path / "model.safetensors"
    tensors = {name: _randomized(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return path


def load_reference(path):
    """transformers' model of a folder, in float32."""
    if json.loads((path / "config.json").read_text())["model_type"] == "deepseek":
        return deepseek_reference.load(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _randomized(name, tensor):
    noise = torch.randn_like(tensor)
    if "norm" in name:
        return 1 + 0.3 * noise
    if "bias" in name:
        return 0.2 * noise
    return noise * (0.2 if "embed" in name else 2 * tensor.shape[-1] ** -0.5)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys(), scope="module")
def path(request, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("model"), *request.param)


@pytest.fixture(scope="module")
def decoder(path):
    return load_model(read_model_config(path), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(path):
    return load_reference(path)


PROMPT = random.Random(0).choices(range(3, 120), k=50)


@torch.no_grad()
def test_logits_match_transformers(decoder, reference):
    expected = reference(torch.tensor([PROMPT])).logits[0]
    ours = NaiveRunner(decoder, 1, len(PROMPT)).step({0: PROMPT})[0]
    assert (ours - expected).norm() / expected.norm() < 1e-4


def test_greedy_completions_equal_those_of_transformers(decoder, reference):
    options = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": None, "use_cache": True}
    output = reference.generate(torch.tensor([PROMPT]), **options)
    assert greedy(decoder, PROMPT, 256) == output[0, len(PROMPT) :].tolist()


def test_every_family_is_under_test():
    assert {model_type for model_type, _ in MODELS.values()} | {"ernie4_5_moe"} == set(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, "multi-head latent attention this decoder does not compute"),
        (
            {"model_type": "llama"},
            "model_type is 'llama'; supported: 'ernie4_5_moe', 'qwen3_moe'",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is True; this decoder computes only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be 'full_attention'"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers must be a list of integers from 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this decoder computes only 'silu'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_its_key(tmp_path, changes, message):
    config = COMMON | EXPERTS | {"model_type": "qwen3_moe"} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_model_config(tmp_path)
