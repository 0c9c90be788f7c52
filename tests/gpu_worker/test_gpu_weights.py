"""Weights in the forms that a GPU streams hold what the checkpoint stores."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_kernels import linear
from cuda_kernels.moe import moe_ffn, pack_experts
from cuda_kernels.tiled import TiledWeight, unpack_tiled
from gpu_worker.layers.ranks import Ranks
from gpu_worker.model import gpu_weights, loader
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.loader import LoadFormat
from gpu_worker.model.plan import ModelPlan, MoEPlan, plan_model
from gpu_worker.model.sharding import shard_plan
from gpu_worker.model.stored_weight import StoredLinear
from gpu_worker.quantizer.recipe import Recipe
from tests.gpu_worker.quantizer.quantizing import quantize
from tests.tiny import CONFIG, QUANTIZATION_CONFIG, make_tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["quantized", "full"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), quantized=request.param)


@pytest.fixture
def plan(folder: Path) -> ModelPlan:
    return plan_model(read_model_config(folder), open_checkpoint(folder))


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


def test_trellis_experts(tmp_path: Path) -> None:
    full = make_tiny_model(tmp_path / "full", quantized=False)
    quantize(full, tmp_path / "out", Recipe(1, low="wint2t", effort="fast", min_rows=16))
    plan = plan_model(read_model_config(tmp_path / "out"), open_checkpoint(tmp_path / "out"))
    experts = experts_of(plan)[-1].experts
    assert {e.up_gate.format for e in experts} == {"wint2t"}
    assert gpu_weights.can_stream_experts(experts)
    streamed = gpu_weights.stream_experts(experts, "shuffled", lambda stored: None)
    for name in ("up_gate", "down"):
        weight = getattr(streamed, name)
        assert isinstance(weight, TiledWeight)
        assert weight.bits == 2
        for number, expert in enumerate(experts):
            dense = getattr(expert, name).dense().float()
            torch.testing.assert_close(
                unpack_tiled(weight, number), dense, rtol=1e-2, atol=0
            )  # rounded twice


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


def tensors_of(value: Any, seen: list[Tensor]) -> list[Tensor]:
    """Those of a dataclass, its fields' fields and items."""
    if isinstance(value, Tensor):
        seen.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            tensors_of(item, seen)
    elif is_dataclass(value):
        for field in fields(value):
            tensors_of(getattr(value, field.name), seen)
    return seen


DENSE = {name: QUANTIZATION_CONFIG | {"dense_quant_type": name} for name in ("wint4", "wint8")}


def load_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, source: LoadFormat) -> Decoder:
    """The Decoder in the forms that a GPU streams."""
    monkeypatch.setattr(linear, "_can_pack", lambda weight: False)
    monkeypatch.setattr(loader, "has_panels", lambda device, dtype: False)
    made = loader._Loader.__init__

    def streaming(self: loader._Loader, *args: Any) -> None:
        made(self, *args)
        self._streams = True

    monkeypatch.setattr(loader._Loader, "__init__", streaming)
    config, device = read_model_config(folder), torch.device("cpu")
    return loader.load_model(config, device=device, dtype=torch.bfloat16, load_format=source)


def assert_no_storage_is_larger_than_its_tensor(decoder: Decoder) -> None:
    found = tensors_of(decoder, [])
    assert len(found) > 30
    for tensor in found:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, tensor.shape


@pytest.mark.parametrize("name", DENSE)
def test_made_up_weights_have_no_more_storage_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A view of something larger would keep all of it."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": DENSE[name]}))
    assert_no_storage_is_larger_than_its_tensor(load_as_on_a_gpu(monkeypatch, tmp_path, "dummy"))


def test_stored_weights_have_no_more_storage_than_they_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_no_storage_is_larger_than_its_tensor(load_as_on_a_gpu(monkeypatch, folder, "auto"))
