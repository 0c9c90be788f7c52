"""Tokens per expert: every token of every step, in each mixture-of-experts layer."""

from __future__ import annotations

from gpu_worker.model.expert_counts import read_expert_tokens
from tests.tiny import CONFIG, make_tiny_model
from wint2 import LLM, SamplingParams


def test_each_token_is_counted_for_each_of_its_experts(tmp_path):
    path = make_tiny_model(tmp_path / "model", quantized=False)
    llm = LLM(path, num_kv_blocks=16, block_size=16, skip_tokenizer_init=True, count_expert_tokens=True)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    llm.generate([[5, 6, 7, 8]], params, use_tqdm=False)
    num_tokens = 4 + 4  # the last one sampled is not computed
    totals = {layer: sum(experts) for layer, experts in read_expert_tokens(llm._model).items()}
    assert totals == {1: num_tokens * CONFIG["moe_k"], 2: num_tokens * CONFIG["moe_k"]}
