"""A model shared by several ranks computes what it computes on one, from every kind of checkpoint."""

import random

import pytest
import torch

from gpu_worker.layers.ranks import ALONE
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model
from tests.checkpoints import make_rank_folders
from tests.gpu_worker.group import CPU, in_group
from tests.gpu_worker.naive import NaiveRunner, greedy
from tests.gpu_worker.test_families import MODELS, save_random
from tests.tiny import make_tiny_model

# Widths of 4, 5 and 6 groups of 64: even shares, uneven ones, and half-filled bytes of local scales. A
# vocabulary of 301 leaves the last rank with less.
SIZES = {
    "vocab_size": 301,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "moe_intermediate_size": 320,
    "moe_num_experts": 3,
    "tie_word_embeddings": False,
}
PROMPT = random.Random(0).choices(range(3, 120), k=40)
CHECKPOINTS = {
    "bfloat16": {"quantized": False},
    "WINT8, WINT4 and WINT2": {"quantized": True},
    "one KV head": {"quantized": True, "num_key_value_heads": 1},
    "tied head": {"quantized": False, "tie_word_embeddings": True, "num_key_value_heads": 2},
}


def load(path, ranks=ALONE, dtype=torch.float32):
    config = read_model_config(path)
    return load_model(config, device=CPU, dtype=dtype, ranks=ranks)


def logits(decoder, dtype=torch.float32):
    return NaiveRunner(decoder, 1, len(PROMPT), dtype).step({0: PROMPT})[0]


def logits_of_group(path, folder, size):
    """Which are the same on every rank, bit for bit."""
    found = in_group(size, folder, lambda ranks: logits(load(path, ranks)))
    for other in found[1:]:
        assert torch.equal(other, found[0])
    return found[0]


@pytest.fixture(scope="module", params=CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def checkpoint(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), **SIZES | request.param)


@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one_rank(checkpoint, tmp_path, size):
    found = logits_of_group(checkpoint, tmp_path, size)
    torch.testing.assert_close(found, logits(load(checkpoint)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_greedy_completions_are_those_of_one_rank(checkpoint, tmp_path, size):
    expected = greedy(load(checkpoint), PROMPT, 24)
    assert in_group(size, tmp_path, lambda ranks: greedy(load(checkpoint, ranks), PROMPT, 24))[0] == expected


def test_a_row_has_the_same_bits_beside_any_others(checkpoint, tmp_path):
    def halves(ranks):
        decoder = load(checkpoint, ranks)
        runner = NaiveRunner(decoder, 1, len(PROMPT))
        parts = [runner.step({0: part})[0] for part in (PROMPT[:7], PROMPT[7:])]
        return torch.equal(torch.cat(parts), logits(decoder))

    assert all(in_group(4, tmp_path, halves))


def test_bfloat16_stays_near(checkpoint, tmp_path):
    exact = logits(load(checkpoint))
    one = logits(load(checkpoint, dtype=torch.bfloat16), torch.bfloat16)

    def work(ranks):
        return logits(load(checkpoint, ranks, torch.bfloat16), torch.bfloat16)

    many = in_group(2, tmp_path, work)[0]
    assert (many - exact).norm() < 1.5 * (one - exact).norm()


@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_cut_for_two_ranks_serves_any_other_number(tmp_path, size):
    sizes = SIZES | {"moe_intermediate_size": 512, "intermediate_size": 512, "vocab_size": 304}
    make_rank_folders(tmp_path / "model", 2, quantized=True, **sizes)
    expected = logits(load(tmp_path / "model"))
    found = logits_of_group(tmp_path / "model", tmp_path, size)
    # What spans the files' ranks is decoded to bfloat16 on one rank and stays quantized on several.
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmoe", "mixtral", "dots1, two of four groups"])
def test_every_family(tmp_path, family):
    """Biases of q, k and v, norms of each head and of all together, gated shared experts, grouped routing."""
    model_type, overrides = MODELS[family]
    wide = {"intermediate_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    path = save_random(tmp_path / "model", model_type, overrides | wide)
    found = logits_of_group(path, tmp_path, 2)
    torch.testing.assert_close(found, logits(load(path)), rtol=1e-4, atol=1e-4)
