"""A GPU's greedy completions are those of the ops' CPU halves, where bfloat16 can tell choices apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_worker.greedy import Agreement, build, complete, judge, random_prompts, text_prompts, to_cpu
from tests.tiny import VOCAB_SIZE, make_tiny_model

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128}
# Logits are bfloat16: neighbours are 2^-8 to 2^-7 apart, and sums in another order differ by some of these.
TOLERANCE = 2**-5
DEMO = Path(__file__).parents[2] / ".demo" / "wint2"


def agreement(folder: Path, prompts: list[list[int]], *, use_cudagraph: bool = True) -> Agreement:
    """64 tokens each."""
    engine, model = build(folder, "cuda", "bfloat16", use_cudagraph=use_cudagraph)
    return judge(to_cpu(model), prompts, complete(engine, prompts, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("use_cudagraph", [True, False])
def test_tiny_model(tmp_path: Path, quantized: bool, use_cudagraph: bool) -> None:
    folder = make_tiny_model(tmp_path, quantized=quantized, **WIDE)
    found = agreement(folder, random_prompts(VOCAB_SIZE, 32, 16), use_cudagraph=use_cudagraph)
    assert found.largest_gap < TOLERANCE, found
    assert found.num_agreed > 0.9 * found.num_tokens, found


@pytest.mark.gpu
@pytest.mark.demo
@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo builds the demo model")
def test_demo_model() -> None:
    found = agreement(DEMO, text_prompts(DEMO, 32, 16))
    assert found.largest_gap < TOLERANCE, found
    assert found.num_agreed > 0.95 * found.num_tokens, found


def test_a_cpu_agrees_with_itself(tmp_path: Path) -> None:
    engine, model = build(make_tiny_model(tmp_path, quantized=True), "cpu", "bfloat16")
    prompts = random_prompts(VOCAB_SIZE, 4, 8)
    completions = complete(engine, prompts, 12)
    assert judge(model, prompts, completions).num_equal >= 3
    wrong = [[token % 200 + 17 for token in completion] for completion in completions]
    assert judge(model, prompts, wrong).largest_gap > TOLERANCE
