"""Node's grpc-js against the running stack: with the .proto files, and with nothing but reflection."""

import json
import subprocess

import pytest

from tests.e2e.node_packages import NODE, install_packages, needs_npm

pytestmark = needs_npm


@pytest.fixture(params=["protos", "reflection"])
def call(request, stack):
    """Runs the client: its exit code, and the messages it received."""
    install_packages()

    def run(*arguments: str) -> tuple[int, list[dict]]:
        command = ["node", "client.js", stack.grpc_address, request.param, *arguments]
        done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=60, check=False)
        assert not done.stderr, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_list_models(call):
    code, (response,) = call("models")
    assert code == 0
    (model,) = response["models"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 2048)


def test_generate_stream(call, client):
    code, (start, *deltas, last) = call("generate", "The answer is")
    http = client.completions.create(
        model="tiny", prompt="The answer is", temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert code == 0
    assert "".join(message["delta"]["text"] for message in deltas) == http.choices[0].text
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"
    assert last["finish"]["usage"]["completion_tokens"] == 12
    assert start["start"]["prompt_tokens"] == last["finish"]["usage"]["prompt_tokens"]


def test_at_once_is_the_stream_put_together(call):
    code, (whole,) = call("at-once", "The answer is")
    _, (_, *deltas, last) = call("generate", "The answer is")
    assert code == 0
    (completion,) = whole["completions"]
    assert completion["text"] == "".join(message["delta"]["text"] for message in deltas)
    assert completion["finish"]["usage"] == last["finish"]["usage"]


def test_chat_stream(call):
    code, (start, *deltas, last) = call("chat", "你好 👩‍👩‍👧")
    assert code == 0
    assert start["event"] == "start"
    assert {message["event"] for message in deltas} == {"delta"}
    assert last["event"] == "finish"


def test_errors_have_a_status_and_words(call):
    code, (*_, last) = call("generate", "")
    assert code == 1
    assert last["error"]["status"] == "INVALID_ARGUMENT"
    assert last["error"]["message"]
