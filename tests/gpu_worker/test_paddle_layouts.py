"""Paddle's 2-bit folders, written by formulas alone, mean what they were written to mean, at any degree."""

import numpy as np
import pytest
import torch

from gpu_worker.layers.ranks import Ranks
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model
from gpu_worker.model.plan import MoEPlan, plan_model
from gpu_worker.model.sharding import shard_plan
from tests.gpu_worker.naive import NaiveRunner
from tests.paddle_writer import write_2bits
from tests.tiny import CONFIG, QUANTIZATION_CONFIG

SIZES = {
    "hidden_size": 128,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "moe_num_experts": 2,
    "moe_num_shared_experts": 0,
}
MODEL = CONFIG | SIZES | {"quantization_config": QUANTIZATION_CONFIG}
FOLDERS = {"one file": 1, "TP2": 2, "TP4": 4}
CPU = torch.device("cpu")


@pytest.fixture(params=FOLDERS.values(), ids=FOLDERS.keys(), scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("paddle")
    return path, write_2bits(path, MODEL, request.param)


def read_plan(path):
    config = read_model_config(path)
    return config, plan_model(config, open_checkpoint(path))


def linears(layer):
    """Projections as lists: an expert may be several that are always chosen together."""
    yield [layer.qkv]
    yield [layer.o]
    mlps = [[layer.mlp]]
    if isinstance(layer.mlp, MoEPlan):
        splits = layer.mlp.num_splits
        starts = range(0, len(layer.mlp.experts), splits)
        mlps = [list(layer.mlp.experts[start : start + splits]) for start in starts]
    for parts in mlps:
        yield [part.up_gate for part in parts]
        yield [part.down for part in parts]


def joined(parts, k_order):
    """[K, N] of all parts of all ranks."""
    dense = [part.dense(k_order).float() for part in parts]
    if parts[0].name.endswith(("o_proj", "down_proj")):
        return torch.cat(dense, dim=1).T
    cut = [weight.split(part.sections) for weight, part in zip(dense, parts, strict=True)]
    return torch.cat([one for section in zip(*cut, strict=True) for one in section]).T


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_weight_is_exactly_what_was_written(folder, size):
    path, meant = folder
    config, plan = read_plan(path)
    shards = [shard_plan(plan, config, Ranks(rank, size)) for rank in range(size)]
    seen = set()
    for index in range(config.num_hidden_layers):
        for of_ranks in zip(*(linears(shard.layers[index]) for shard in shards), strict=True):
            parts = [part for one in of_ranks for part in one]
            assert torch.equal(joined(parts, "shuffled"), torch.from_numpy(meant[parts[0].name]))
            seen.add(parts[0].name)
    assert seen == set(meant)


@pytest.mark.parametrize("is_shuffled", [True, False], ids=["shuffled", "natural"])
def test_either_order_of_rows(tmp_path, is_shuffled):
    meant = write_2bits(tmp_path, MODEL, is_shuffled=is_shuffled)
    _, plan = read_plan(tmp_path)
    order, other = ("shuffled", "natural") if is_shuffled else ("natural", "shuffled")
    down = plan.layers[2].mlp.experts[1].down
    assert np.array_equal(down.dense(order).float().T, meant[down.name])
    assert not np.array_equal(down.dense(other).float().T, meant[down.name])


def test_the_vocabulary_is_joined(folder):
    _, plan = read_plan(folder[0])
    assert plan.embedding.dense().shape == (MODEL["vocab_size"], MODEL["hidden_size"])


def test_it_computes(folder):
    decoder = load_model(read_model_config(folder[0]), device=CPU, dtype=torch.float32)
    logits = NaiveRunner(decoder, 1, 9).step({0: list(range(5, 14))})[0]
    assert logits.isfinite().all()
    assert logits.std() > 0.1
