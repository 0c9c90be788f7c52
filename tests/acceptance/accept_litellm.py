"""litellm: answers, streams, and errors by their kind."""

from __future__ import annotations

import litellm
import pytest

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def options(server) -> dict[str, object]:
    return {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "x", "messages": HI}


def test_answer_and_stream(options):
    answer = litellm.completion(**options, max_tokens=8)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 8)
    chunks = list(litellm.completion(**options, max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_errors_have_their_kind(options):
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options, max_tokens=100_000)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/nope"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**options, temperature=9)
