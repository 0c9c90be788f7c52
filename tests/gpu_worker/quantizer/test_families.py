"""Every family quantizes, and what the quantizer wrote loads and computes the same model."""

import pytest
import torch

from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model
from gpu_worker.model.plan import plan_model
from gpu_worker.quantizer.pipeline import quantize_checkpoint
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.source import Source
from tests.gpu_worker.naive import NaiveRunner
from tests.gpu_worker.test_families import DOTS, EXPERTS, save_random

MODELS = {
    "qwen3_moe": EXPERTS | {"num_experts": 3, "norm_topk_prob": True},
    "qwen2_moe": EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 72},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "dots1": DOTS
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 2.5,
    },
}
CPU = torch.device("cpu")
PROMPT = list(range(3, 40))


# Relative errors of weights; WINT2's are fitted to few activations here. A wrong weight would have 1.4.
WORST = {"none": 2**-8, "wint8": 0.02, "wint2": 0.75}


def read_plan(path):
    config = read_model_config(path)
    return plan_model(config, open_checkpoint(path))


def relative_error(ours, theirs):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-9))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_quantized_family_is_the_same_model_and_runs(tmp_path, model_type):
    source = save_random(tmp_path / "full", model_type, MODELS[model_type] | {"num_hidden_layers": 1})
    recipe = Recipe(effort="fast", min_rows=8, correct_experts=False, correct_dense=False)
    calibration = torch.randint(120, (2, 24), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(Source(read_model_config(source), CPU), tmp_path / "out", calibration, recipe)
    full, quantized = read_plan(source), read_plan(tmp_path / "out")
    ours_by_place = [weight for weight in quantized.weights() if "correction_bias" not in weight.name]
    theirs_by_place = [weight for weight in full.weights() if "correction_bias" not in weight.name]
    assert {weight.format for weight in ours_by_place} == {"none", "wint8", "wint2"}
    for ours, theirs in zip(ours_by_place, theirs_by_place, strict=True):
        assert ours.kind == theirs.kind
        assert relative_error(ours.dense().view_as(theirs.dense()), theirs.dense()) < WORST[ours.format], (
            ours.name
        )
    decoder = load_model(read_model_config(tmp_path / "out"), device=CPU, dtype=torch.float32)
    logits = NaiveRunner(decoder, 1, len(PROMPT)).step({0: PROMPT})[0]
    assert logits.isfinite().all()
    assert logits.std() > 0.01
