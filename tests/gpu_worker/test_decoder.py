"""The decoder against transformers, and against itself in any batch and any chunking."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Ernie4_5_MoeForCausalLM

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model
from tests.gpu_worker.naive import NaiveRunner, greedy
from tests.tiny import CONFIG, dequantized, make_tiny_model, save_hf, tiny_weights

SHAPES = {
    "grouped heads": {},
    "one head for each": {"num_key_value_heads": 4},
    "one KV head": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "heads wider than hidden": {"head_dim": 32},
    "all layers MoE": {"moe_layer_start_index": 0},
    "every second layer MoE": {"num_hidden_layers": 4, "moe_layer_end_index": 3, "moe_layer_interval": 2},
    "one expert of many": {"moe_num_experts": 16, "moe_k": 1},
    "all experts": {"moe_k": 4},
    "no shared experts": {"moe_num_shared_experts": 0},
    "two shared experts": {"moe_num_shared_experts": 2},
    "untied head": {"tie_word_embeddings": False},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 100, "moe_intermediate_size": 40, "head_dim": 18},
    "other rope and norm": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
}


def load(path, dtype=torch.float32):
    return load_model(read_model_config(path), device=torch.device("cpu"), dtype=dtype)


def load_hf(path, dtype=torch.float32):
    return Ernie4_5_MoeForCausalLM.from_pretrained(path, dtype=dtype).eval()


def random_tokens(count, seed=0):
    return random.Random(seed).choices(range(CONFIG["vocab_size"]), k=count)


def logits(decoder, tokens, dtype=torch.float32):
    return NaiveRunner(decoder, 1, len(tokens), dtype).step({0: tokens})[0]


@torch.no_grad()
def hf_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_logits_match_transformers(tmp_path, overrides):
    path = make_tiny_model(tmp_path, quantized=False, **overrides)
    tokens = random_tokens(90)
    expected = hf_logits(load_hf(path), tokens)
    error = (logits(load(path), tokens) - expected).norm() / expected.norm()
    assert error < 1e-4


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.data())
def test_logits_match_transformers_over_random_shapes(tmp_path_factory, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kv_heads, layers, start = draw(1, 3), draw(1, 4), draw(0, 3)
    overrides = {
        "hidden_size": 8 * draw(2, 12),
        "intermediate_size": 2 * draw(3, 75),
        "moe_intermediate_size": 4 * draw(2, 22),  # transformers multiplies in multiples of 16 bytes
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(1, 4),
        "head_dim": 2 * draw(2, 16),
        "num_hidden_layers": layers,
        "moe_layer_start_index": min(start, layers - 1),
        "moe_layer_end_index": layers - 1,
        "moe_num_experts": draw(2, 9),
        "moe_k": draw(1, 2),
        "moe_num_shared_experts": draw(0, 2),
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    path = make_tiny_model(tmp_path_factory.mktemp("drawn"), quantized=False, seed=draw(0, 99), **overrides)
    tokens = random_tokens(draw(1, 70), seed=draw(0, 99))
    expected = hf_logits(load_hf(path), tokens)
    assert (logits(load(path), tokens) - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("overrides", [{}, {"moe_k": 4}], ids=["routed", "all experts"])
def test_bfloat16_is_as_near_to_float32_as_transformers(tmp_path, overrides):
    path = make_tiny_model(tmp_path, quantized=False, **overrides)
    tokens = random_tokens(60)
    exact = hf_logits(load_hf(path), tokens)
    theirs = (hf_logits(load_hf(path, torch.bfloat16), tokens) - exact).norm()
    ours = (logits(load(path, torch.bfloat16), tokens, torch.bfloat16) - exact).norm()
    assert ours < 1.5 * theirs


def generate_hf(path, prompt, count):
    output = load_hf(path).generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, use_cache=True
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "WINT8, WINT4 and WINT2"])
def test_greedy_completions_equal_those_of_transformers(tmp_path, quantized):
    path = make_tiny_model(tmp_path / "ours", quantized=quantized)
    reference = path
    if quantized:
        reference = make_tiny_model(tmp_path / "dequantized", quantized=False)
        save_hf(dequantized(CONFIG, tiny_weights(CONFIG, seed=0)), reference / "model.safetensors")
    prompt = random_tokens(40)
    completion = greedy(load(path), prompt, 256)
    assert completion == generate_hf(reference, prompt, 256)
    assert len(set(completion)) > 20


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load(make_tiny_model(tmp_path_factory.mktemp("tiny"), quantized=True))


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lens=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_logits_have_the_same_bits_in_any_batch_and_any_chunking(decoder, lens, seed):
    draw = random.Random(seed)
    prompts = [random_tokens(length, seed=index) for index, length in enumerate(lens)]
    expected = [logits(decoder, prompt) for prompt in prompts]
    runner = NaiveRunner(decoder, len(prompts), 64)
    while any(done < len(prompt) for done, prompt in zip(runner.lens, prompts, strict=True)):
        starts = list(runner.lens)
        chunks = {
            s: prompt[starts[s] : starts[s] + draw.choice([1, 1, 3, 20])]
            for s, prompt in enumerate(prompts)
            if starts[s] < len(prompt) and draw.random() < 0.7
        }
        for s, out in (runner.step(chunks) if chunks else {}).items():
            assert torch.equal(out, expected[s][starts[s] : starts[s] + len(out)])


def test_memory_counts_what_is_stored_and_what_is_held(decoder):
    stored, held = decoder.memory.stored_bytes, decoder.memory.device_bytes
    # 2 MoE layers of 4 experts, three matrices of 64 x 64, held as they are stored: no dense copy.
    assert held["experts"] < 2 * 4 * 3 * 64 * 64
    assert held["experts"] < 1.1 * stored["experts"]
    assert held["embedding"] == stored["embedding"] == CONFIG["vocab_size"] * 64 * 2
