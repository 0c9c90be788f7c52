"""POST /tokenize and /detokenize."""

from __future__ import annotations

from tests.gateway.harness import Stack

HI = [byte + 3 for byte in b"hi"]


async def test_text(stack: Stack) -> None:
    response = await stack.http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})
    assert response.json() == {"count": 2, "max_model_len": 4096, "tokens": HI, "token_strs": ["h", "i"]}


async def test_a_conversation(stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await stack.http.post("/tokenize", json=body)).json()["count"] == len("user: hi\n")


async def test_back_to_text(stack: Stack) -> None:
    assert (await stack.http.post("/detokenize", json={"tokens": HI})).json() == {"prompt": "hi"}


async def test_refusals(stack: Stack) -> None:
    for body, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"prompt": "x", "text": "y"}, "text"),
        ({"messages": [{"role": "user", "content": ""}], "chat_template": "x"}, "chat_template"),
    ):
        response = await stack.http.post("/tokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
