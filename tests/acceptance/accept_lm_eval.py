"""lm-eval's local-completions: token-id prompts with echoed logprobs score as the offline engine does."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

PAIRS = [("the thing", " is one of a kind"), ("once", " upon a time there was another")]


@pytest.fixture
def model(server) -> LocalCompletionsAPI:
    url = f"{server.url}/v1/completions"
    return LocalCompletionsAPI(
        base_url=url, model="tiny", tokenizer=str(server.model), tokenized_requests=True, batch_size=2
    )


def test_scores_are_the_offline_engines(server, model):
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    scores = [score for score, _ in model.loglikelihood(requests)]
    encoded = [model._encode_pair(*pair) for pair in PAIRS]
    offline = server.score([[*context, *continuation] for context, continuation in encoded])
    expected = [
        sum(logprobs[len(context) :]) for logprobs, (context, _) in zip(offline, encoded, strict=True)
    ]
    assert scores == pytest.approx(expected, abs=1e-3)


def test_generation_ends_at_the_stop(model):
    request = Instance("generate_until", {}, ("the thing", {"until": ["e"], "max_gen_toks": 16}), 0)
    [text] = model.generate_until([request])
    assert "e" not in text
