"""OpenAI's npm package against the running stack: it says what the Python package says."""

import json
import subprocess

import pytest

from tests.e2e.node_packages import NODE, install_packages, needs_npm

pytestmark = needs_npm


@pytest.fixture
def ask(stack):
    install_packages()

    def run(what: str):
        command = ["node", "openai.js", stack.url, what]
        done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=120, check=False)
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_model_is_listed(ask):
    assert [model["id"] for model in ask("models")] == ["tiny"]


def test_an_answer_and_its_stream_are_the_python_clients(ask, client):
    messages = [{"role": "user", "content": "hi"}]
    expected = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_completion_tokens=12
    )
    answer, (*chunks, last) = ask("chat"), ask("stream")
    assert answer["choices"][0]["message"]["content"] == expected.choices[0].message.content
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == expected.choices[0].message.content
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == expected.usage.completion_tokens


def test_a_call_that_must_be_made_is_put_together(ask):
    [call] = ask("tool")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["day"] in ("today", "tomorrow")


def test_an_error_has_its_kind(ask):
    error = ask("error")
    assert error.pop("id")
    assert error == {
        "kind": "BadRequestError", "status": 400, "param": "temperature", "code": "invalid_value"
    }  # fmt: skip
