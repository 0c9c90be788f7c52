"""Weights in the forms that a GPU streams hold what the checkpoint stores."""

from pathlib import Path

import pytest
import torch

from cuda_kernels.moe import moe_ffn, pack_experts
from cuda_kernels.tiled import unpack_tiled
from gpu_worker.layers.ranks import Ranks
from gpu_worker.model import gpu_weights
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.plan import ModelPlan, MoEPlan, plan_model
from gpu_worker.model.sharding import shard_plan
from gpu_worker.model.stored_weight import StoredLinear
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["quantized", "full"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPlan:
    path = make_tiny_model(tmp_path_factory.mktemp("tiny"), quantized=request.param)
    return plan_model(read_model_config(path), open_checkpoint(Path(path)))


def experts_of(plan: ModelPlan) -> list[MoEPlan]:
    return [layer.mlp for layer in plan.layers if isinstance(layer.mlp, MoEPlan)]


def test_dense_layers(plan: ModelPlan) -> None:
    projections = [layer.qkv for layer in plan.layers] + [layer.o for layer in plan.layers]
    streamed = [stored for stored in projections if gpu_weights.can_stream(stored)]
    assert len(streamed) == (len(projections) if projections[0].format == "wint8" else 0)
    for stored in streamed:
        weight = gpu_weights.stream_linear(stored)
        assert torch.equal(unpack_tiled(weight).bfloat16(), stored.dense())


def test_experts(plan: ModelPlan) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 64).bfloat16()
    ids = torch.rand(5, 4).argsort(1)[:, :2].int().contiguous()
    weights = torch.rand(5, 2)
    for moe in experts_of(plan):
        assert gpu_weights.can_stream_experts(moe.experts)
        read: list[StoredLinear] = []
        streamed = gpu_weights.stream_experts(moe.experts, "shuffled", read.append)
        assert sum(stored.stored_bytes for stored in read) == _stored_bytes(moe)
        dense = pack_experts([(e.up_gate.dense(), e.down.dense()) for e in moe.experts], 4, 2)
        out, expected = (moe_ffn(hidden, ids, weights, form).float() for form in (streamed, dense))
        assert float((out - expected).norm() / expected.norm()) < 1e-2


def _stored_bytes(moe: MoEPlan) -> int:
    return sum(expert.up_gate.stored_bytes + expert.down.stored_bytes for expert in moe.experts)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_ranks_part_is_streamed_too(tmp_path: Path, quantized: bool) -> None:
    make_tiny_model(tmp_path, quantized=quantized, moe_intermediate_size=320)
    config = read_model_config(tmp_path)
    part = shard_plan(plan_model(config, open_checkpoint(tmp_path)), config, Ranks(1, 2))
    for moe in experts_of(part):
        assert gpu_weights.can_stream_experts(moe.experts)
        gpu_weights.stream_experts(moe.experts, "shuffled", lambda stored: None)
