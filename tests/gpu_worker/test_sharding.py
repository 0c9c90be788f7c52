"""Parts of a model for any tensor-parallel degree, from whole checkpoints and from those cut for another."""

from dataclasses import replace

import pytest
import torch

from gpu_worker.layers.ranks import ALONE, Ranks
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.plan import plan_model
from gpu_worker.model.sharding import degree_problem, shard_plan
from gpu_worker.model.stored_weight import dequantize
from tests.checkpoints import make_rank_folders
from tests.tiny import make_tiny_model

# Widths of 1, 5 and 6 groups of 64: even shares, uneven ones, and half-filled bytes of local scales.
SIZES = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "moe_intermediate_size": 320,
    "moe_num_experts": 2,
}


def read_plan(path):
    config = read_model_config(path)
    return config, plan_model(config, open_checkpoint(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("whole"), quantized=True, **SIZES)


@pytest.fixture(scope="module")
def in_ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    make_rank_folders(path, 2, quantized=True, **SIZES | {"moe_intermediate_size": 512})
    return path


def sections(weight_NK, stored):
    return weight_NK.split(stored.sections)


def join_outputs(parts):
    by_section = zip(*(sections(part.dense(), part) for part in parts), strict=True)
    return torch.cat([part for section in by_section for part in section])


def expert_parts(moe, expert):
    return moe.experts[expert * moe.num_splits : (expert + 1) * moe.num_splits]


@pytest.mark.parametrize(
    ("folder", "size"), [("whole", 2), ("whole", 4), ("in_ranks", 1), ("in_ranks", 2), ("in_ranks", 4)]
)
def test_the_parts_of_all_ranks_are_the_whole(request, folder, size):
    config, plan = read_plan(request.getfixturevalue(folder))
    assert degree_problem(config, size) is None
    shards = [shard_plan(plan, config, Ranks(rank, size)) for rank in range(size)]
    for index, layer in enumerate(plan.layers):
        parts = [shard.layers[index] for shard in shards]
        mlps = [(layer.mlp, [part.mlp for part in parts])]
        if config.is_moe_layer(index):
            mlps = [(layer.mlp.experts[1], [one for part in parts for one in expert_parts(part.mlp, 1)])]
        assert torch.equal(join_outputs([part.qkv for part in parts]), layer.qkv.dense())
        assert torch.equal(torch.cat([part.o.dense() for part in parts], dim=1), layer.o.dense())
        for mlp, cut in mlps:
            assert torch.equal(join_outputs([part.up_gate for part in cut]), mlp.up_gate.dense())
            assert torch.equal(torch.cat([part.down.dense() for part in cut], dim=1), mlp.down.dense())


@pytest.mark.parametrize("size", [2, 4])
def test_quantized_parts_stay_quantized(whole, in_ranks, size):
    for path in (whole, in_ranks):
        config, plan = read_plan(path)
        for rank in range(size):
            for stored in shard_plan(plan, config, Ranks(rank, size)).weights():
                if stored.format != "none" and "self_attn.o_proj" not in stored.name:
                    assert stored.is_one_weight, (path, stored.name)
                    decoded = dequantize(stored.format, stored.read(), "shuffled")
                    assert torch.equal(decoded[: stored.num_inputs].T, stored.dense())


def test_a_part_over_ranks_with_scales_of_their_own_is_only_decoded(in_ranks):
    config, plan = read_plan(in_ranks)
    shard = shard_plan(plan, config, ALONE)
    assert shard.layers[2].mlp.num_splits == 2
    down = shard.layers[0].mlp.down
    assert not down.is_one_weight
    with pytest.raises(ValueError, match="spans ranks"):
        down.read()


def test_a_degree_that_cannot_be_is_refused_with_the_numbers(whole):
    config = read_model_config(whole)
    assert degree_problem(config, 3) == "3 does not divide the model's 8 attention heads"
    odd = replace(config, num_attention_heads=12, num_key_value_heads=4)
    assert degree_problem(odd, 6) == "6 neither divides nor is a multiple of the model's 4 key-value heads"
    narrow = read_model_config(make_tiny_model(whole / "narrow", quantized=False))
    assert degree_problem(narrow, 2) == "2 ranks cannot share 64 hidden features in groups of 64"
