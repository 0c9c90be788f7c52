"""The kernels that are built ahead are those that the model's weights need."""

from dataclasses import replace
from pathlib import Path

import torch

from cuda_kernels.build import Variant
from gpu_worker.engine.gpu_kernels import build_kernels, kernels_of
from gpu_worker.layers.moe import MoE
from gpu_worker.model import gpu_weights
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.loader import load_model
from gpu_worker.model.plan import MoEPlan, plan_model
from tests.tiny import make_tiny_model


def streamed(path: Path) -> Decoder:
    """A quantized tiny model whose experts are in the GPU's forms."""
    config = read_model_config(path)
    decoder = load_model(config, device=torch.device("cpu"), dtype=torch.bfloat16)
    plan, layers = plan_model(config, open_checkpoint(path)), []
    for layer, planned in zip(decoder.layers, plan.layers, strict=True):
        if isinstance(layer.mlp, MoE) and isinstance(planned.mlp, MoEPlan):
            experts = gpu_weights.stream_experts(planned.mlp.experts, "shuffled", lambda stored: None)
            layer = replace(layer, mlp=replace(layer.mlp, experts=experts))
        layers.append(layer)
    return replace(decoder, layers=tuple(layers))


def test_kernels_follow_the_weights_formats(tmp_path: Path) -> None:
    wanted = set(
        kernels_of(streamed(make_tiny_model(tmp_path / "q", quantized=True)), torch.bfloat16, "sm_90a")
    )
    stems = {variant.stem for variant in wanted}
    assert {"norm", "rope", "kv_store", "route", "routing", "moe_wint2", "tiled_linear"} <= stems
    assert {dict(v.defines)["BITS"] for v in wanted if v.stem == "tiled_linear"} == {4}
    assert Variant("untile", (("BITS", 4),)) in wanted
    assert not any(stem.startswith("attention") for stem in stems), "head_dim 16 has no kernel"


def test_a_cpu_needs_none(tmp_path: Path) -> None:
    model = streamed(make_tiny_model(tmp_path / "q", quantized=True))
    build_kernels(model, torch.device("cpu"), torch.bfloat16)
