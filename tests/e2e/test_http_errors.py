"""Bad HTTP requests: OpenAI's body, the right status, no internals, and the server goes on."""

from __future__ import annotations

import httpx
import pytest

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]


@pytest.fixture
def http(stack):
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny"}, "messages"),
        ({"model": "tiny", "messages": []}, "messages"),
        ({"model": "tiny", "messages": "hello"}, "messages"),
        ({"model": "tiny", "messages": [{"content": "x"}]}, "messages"),
        ({"model": "tiny", "messages": USER, "temperature": "hot"}, "temperature"),
        ({"model": "tiny", "messages": USER, "max_tokens": 1.5}, "max_tokens"),
        ({"model": "tiny", "messages": USER, "stream": "yes please"}, "stream"),
        ({"model": 5, "messages": USER}, "model"),
        ({"model": "tiny", "messages": USER, "no_such_parameter": 1}, "no_such_parameter"),
    ],
)
def test_a_wrong_body_names_the_parameter(http, body, param):
    response = http.post(CHAT, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[1, 2]", b'"x"', b"\xff\xfe", b'{"model": NaN}'])
def test_broken_json(http, body):
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/health").status_code == 200


def test_unknown_path_and_wrong_method(http):
    assert http.get("/v1/nonsense").status_code == 404
    assert http.get("/v1/nonsense").json()["error"]["message"]
    assert http.get(CHAT).status_code == 405


def test_health_and_metrics(http):
    assert http.get("/health").status_code == 200
    metrics = http.get("/metrics").text
    assert "time_to_first_token_seconds" in metrics
