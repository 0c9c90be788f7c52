"""A GPU's greedy completions are as near to float32's as bfloat16 allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_worker.greedy import build, complete, judge, random_prompts, text_prompts
from tests.tiny import VOCAB_SIZE, make_tiny_model

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128}
DEMO = Path(__file__).parents[2] / ".demo" / "wint2"


def assert_like_bfloat16_on_a_cpu(folder: Path, prompts: list[list[int]], *, use_cudagraph: bool) -> None:
    """A GPU departs from float32 no more often, and no farther, than a CPU does in bfloat16."""
    judged = {}
    _, exact = build(folder, "cpu", "float32")
    for device in ("cuda", "cpu"):
        engine, _ = build(folder, device, "bfloat16", use_cudagraph=use_cudagraph)
        judged[device] = judge(exact, prompts, complete(engine, prompts, 64))
    few = 0.02 * judged["cpu"].num_tokens
    assert judged["cuda"].num_agreed > judged["cpu"].num_agreed - few, judged
    assert judged["cuda"].largest_gap < max(2**-6, 2 * judged["cpu"].largest_gap), judged


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("use_cudagraph", [True, False])
def test_tiny_model(tmp_path: Path, quantized: bool, use_cudagraph: bool) -> None:
    folder = make_tiny_model(tmp_path, quantized=quantized, **WIDE)
    assert_like_bfloat16_on_a_cpu(folder, random_prompts(VOCAB_SIZE, 16, 16), use_cudagraph=use_cudagraph)


@pytest.mark.gpu
@pytest.mark.demo
@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo builds the demo model")
def test_demo_model() -> None:
    assert_like_bfloat16_on_a_cpu(DEMO, text_prompts(DEMO, 32, 16), use_cudagraph=True)


def test_a_cpu_agrees_with_itself(tmp_path: Path) -> None:
    engine, model = build(make_tiny_model(tmp_path, quantized=True), "cpu", "bfloat16")
    prompts = random_prompts(VOCAB_SIZE, 4, 8)
    completions = complete(engine, prompts, 12)
    assert judge(model, prompts, completions).num_equal >= 3
    wrong = [[token % 200 + 17 for token in completion] for completion in completions]
    assert judge(model, prompts, wrong).largest_gap > 0.05
