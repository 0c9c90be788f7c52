"""langchain-openai: answers, streams, bound tools, structured output."""

from __future__ import annotations

from typing import Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def weather(day: Literal["today", "tomorrow"]) -> str:
    """Tells the weather."""
    return "sunny"


class Verdict(BaseModel):
    ok: bool
    kind: Literal["a", "b"]


@pytest.fixture
def llm(server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="x", model="tiny", max_tokens=400, seed=1, max_retries=0,
        stream_usage=True, timeout=300,
    )  # fmt: skip


def test_a_stream_adds_up_to_the_answer(llm):
    whole = llm.invoke("hi", max_tokens=16)
    total = None
    for chunk in llm.stream("hi", max_tokens=16):
        total = chunk if total is None else total + chunk
    assert total.content == whole.content
    assert total.usage_metadata == whole.usage_metadata


def test_a_tool_is_called_and_answered(llm):
    called = llm.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke("weather?")
    [call] = called.tool_calls
    assert weather.invoke(call["args"]) == "sunny"
    history = [HumanMessage("weather?"), called, ToolMessage("sunny", tool_call_id=call["id"])]
    assert llm.bind_tools([weather]).invoke(history, max_tokens=8).response_metadata["finish_reason"]


def test_a_tool_is_called_in_a_stream(llm):
    total = None
    for chunk in llm.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).stream("?"):
        total = chunk if total is None else total + chunk
    assert [call["name"] for call in total.tool_calls] == ["weather"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(llm, method):
    verdict = llm.with_structured_output(Verdict, method=method, strict=True).invoke("?")
    assert isinstance(verdict, Verdict)
