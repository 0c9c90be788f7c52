"""Every wrong request gets OpenAI's error body with the status and the field that the table says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.fakes import FakeWorker
from tests.gateway.harness import MODEL, Stack, serving_stack, stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
NESTED = json.loads("[" * 60 + "]" * 60)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "g"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_CALL = CALL | {"function": {"name": "f", "arguments": "[]"}}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages.0.content"),
        ({"messages": [HI[0] | {"tool_calls": [CALL]}]}, "invalid_value", "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "missing_required_parameter", "messages.0.content"),
        ({"messages": [{"role": "tool", "content": ""}]}, "missing_required_parameter",
         "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "invalid_value",
         "messages.0.tool_calls.0.function.arguments"),
        ({"temperature": "warm"}, "invalid_value", "temperature"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"temperature": True}, "invalid_value", "temperature"),
        ({"top_p": -0.1}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"seed": 1 << 63}, "invalid_value", "seed"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 129}, "invalid_value", "n"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids.0"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"tempratur": 1}, "unknown_parameter", "tempratur"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools.0.function"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"tools": [TOOL | {"type": "retrieval"}]}, "invalid_value", "tools.0.type"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "invalid_value", "response_format"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter",
         "response_format.json_schema.json_schema"),
        ({"guided_json": {"a": NESTED}}, "invalid_value", "guided_json"),
        ({"guided_json": {}, "guided_regex": "a"}, "invalid_value", "guided_regex"),
        ({"guided_json": {"a": "x" * 70_000}}, "invalid_value", "guided_json"),
        ({"guided_choice": []}, "invalid_value", "guided_choice"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"tag": "x"}}, "unknown_parameter", "structured_outputs.tag"),
        ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
        ({"bad_words": [""]}, "invalid_value", "bad_words.0"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"length_penalty": 1.5}, "unsupported_parameter", "length_penalty"),
        ({"detokenize": False}, "unsupported_parameter", "detokenize"),
        ({"guided_decoding_backend": "xgrammar"}, "unsupported_parameter", "guided_decoding_backend"),
        ({"response_max_tokens": 9}, "unsupported_parameter", "response_max_tokens"),
        ({"chat_template": "x"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": {"a": NESTED}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": 10**400}}, "invalid_value", "chat_template_kwargs"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_wrong_fields(stack_once: Stack, fields: dict[str, Any], code: str, param: str) -> None:
    body = {"model": MODEL, "messages": HI, **fields}
    response = await stack_once.http.post(CHAT, content=json.dumps(body).encode())
    error = error_of(response)
    assert response.status_code == 400
    assert (error["code"], error["param"]) == (code, param)


async def test_fields_that_ask_for_nothing_pass(stack_once: Stack) -> None:
    neutral = {
        "best_of": 1,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "early_stopping": False,
        "detokenize": True,
        "spaces_between_special_tokens": True,
        "guided_decoding_backend": None,
        "response_max_tokens": None,
    }
    assert (await stack_once.chat(**neutral)).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt"),
        ([1, "x"], "prompt"),
        ([-1], "prompt"),
        ({}, "prompt"),
    ],
)
async def test_wrong_prompts(stack_once: Stack, prompt: Any, param: str) -> None:
    response = await stack_once.complete(prompt)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert len(error_of(response)["message"]) < 200


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_value"),
        (b"5", "invalid_value"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_value"),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", "invalid_json"),
    ],
)
async def test_wrong_json(stack_once: Stack, content: bytes, code: str) -> None:
    response = await stack_once.http.post(TEXT, content=content)
    assert response.status_code == 400
    assert error_of(response)["code"] == code


async def test_no_body(stack_once: Stack) -> None:
    response = await stack_once.http.post(TEXT)
    assert (response.status_code, error_of(response)["code"]) == (400, "missing_required_parameter")


async def test_missing_prompt(stack_once: Stack) -> None:
    response = await stack_once.http.post(TEXT, json={"model": MODEL})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        400,
        "missing_required_parameter",
        "prompt",
    )


async def test_unknown_url_and_method(stack_once: Stack) -> None:
    unknown = await stack_once.http.get("/v2/models")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
    wrong = await stack_once.http.get(CHAT)
    assert (wrong.status_code, error_of(wrong)["code"], wrong.headers["allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )


async def test_wrong_content_type(stack_once: Stack) -> None:
    response = await stack_once.http.post(TEXT, content=b"prompt=x", headers={"content-type": "text/plain"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


async def test_unknown_model_names_those_there_are(stack_once: Stack) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await stack_once.openai.chat.completions.create(model="gpt-9", messages=HI)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert MODEL in caught.value.message
    response = await stack_once.http.get("/v1/models/gpt-9")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


async def test_too_long_for_the_context(stack_once: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await stack_once.openai.chat.completions.create(model=MODEL, messages=HI, max_tokens=4096)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "4096" in caught.value.message


async def test_body_too_large() -> None:
    async with serving_stack(max_body_bytes=1000) as (made, _):
        response = await made.complete("x" * 1000)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        assert (await made.complete("x" * 900)).status_code == 200


async def test_api_keys() -> None:
    async with serving_stack(api_key=("secret", "other")) as (made, _):
        missing = await made.complete()
        assert (missing.status_code, error_of(missing)["code"]) == (401, "invalid_api_key")
        wrong = await made.http.get("/v1/models", headers={"authorization": "Bearer nope"})
        assert wrong.status_code == 401
        assert "nope" not in wrong.text
        right = await made.http.get("/v1/models", headers={"authorization": "Bearer other"})
        assert right.status_code == 200
        assert (await made.http.get("/health")).status_code == 200


async def test_no_worker_is_503_with_retry_after() -> None:
    async with stack() as made:
        response = await made.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "no_worker")
        assert response.headers["retry-after"] == "5"


async def test_too_many_choices() -> None:
    async with serving_stack(max_choices=4) as (made, _):
        response = await made.complete(["a", "b", "c"], n=2)
        assert (response.status_code, error_of(response)["param"]) == (400, "n")


async def test_a_fault_of_the_worker_tells_no_internals() -> None:
    fake = FakeWorker()
    fake.error = RuntimeError("secret path /etc/shadow")
    async with serving_stack(fake) as (made, _):
        response = await made.chat()
        assert (response.status_code, error_of(response)["code"]) == (500, "server_error")
        assert "shadow" not in response.text


async def test_request_ids_come_back(stack_once: Stack) -> None:
    named = await stack_once.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"
    failed = await stack_once.http.get("/nowhere")
    assert failed.headers["x-request-id"]
