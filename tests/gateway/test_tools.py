"""Tools, reasoning and structured output over the wire; the parser itself is tested by itself."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.fakes import FakeWorker, encode
from tests.gateway.harness import MODEL, Stack

HI = [{"role": "user", "content": "weather?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"type": "string"}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
ANSWER = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
FORCED = '[{"name": "weather", "arguments": {"city": "Bern"}}]'


def say(worker: FakeWorker, text: str) -> None:
    worker.completion = list(encode(text).ids)


async def ask(stack: Stack, **fields: Any) -> Any:
    fields = {"tools": [WEATHER, TIME], **fields}
    return await stack.openai.chat.completions.create(model=MODEL, messages=HI, **fields)


async def test_calls(stack: Stack, worker: FakeWorker) -> None:
    say(worker, ANSWER)
    [choice] = (await ask(stack)).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("weather", '{"city": "Bern"}'), ("time", "{}")]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert json.loads(stack.tokenizer.conversations[0].tools_json[0]) == WEATHER


async def test_streamed_calls(stack: Stack, worker: FakeWorker) -> None:
    say(worker, ANSWER)
    worker.delay_seconds = 0.005  # what is ready at once would be one piece
    content, calls, reasons, num_pieces = "", [], [], 0
    async for chunk in await ask(stack, stream=True):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            if piece.id:
                calls.append(piece)
            else:
                calls[piece.index].function.arguments += piece.function.arguments
                num_pieces += 1
        reasons.append(choice.finish_reason)
    assert content == "I look."
    assert num_pieces > 1  # arguments come as they are written
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, "weather", '{"city": "Bern"}'),
        (1, "time", "{}"),
    ]
    assert reasons[-1] == "tool_calls"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_without_parallel_calls_the_first_counts(
    stack: Stack, worker: FakeWorker, is_stream: bool
) -> None:
    say(worker, ANSWER)
    response = await stack.chat(tools=[WEATHER, TIME], parallel_tool_calls=False, stream=is_stream)
    assert '"weather' in response.text
    assert '"time' not in response.text


async def test_required_calls_are_made_by_the_engine(stack: Stack, worker: FakeWorker) -> None:
    say(worker, FORCED)
    [choice] = (await ask(stack, tool_choice="required", parallel_tool_calls=False)).choices
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Bern"}'
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    schema = json.loads(worker.requests[0].sampling_params.structured_output.json_schema)
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["weather", "time"]
    assert schema["$defs"] == {"City": {"type": "string"}}
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)


async def test_a_named_tool_is_the_only_one(stack: Stack, worker: FakeWorker) -> None:
    say(worker, '[{"name": "time", "arguments": {}}]')
    [choice] = (await ask(stack, tool_choice={"type": "function", "function": {"name": "time"}})).choices
    assert choice.message.tool_calls[0].function.name == "time"
    schema = worker.requests[0].sampling_params.structured_output.json_schema
    assert '"weather"' not in schema


async def test_no_tools_are_offered_with_none(stack: Stack, worker: FakeWorker) -> None:
    say(worker, ANSWER)
    [choice] = (await ask(stack, tool_choice="none")).choices
    assert (choice.message.content, choice.message.tool_calls) == (ANSWER, None)
    assert not stack.tokenizer.conversations[0].tools_json


async def test_a_template_without_tools_is_not_passed_over(stack: Stack) -> None:
    stack.tokenizer.knows_tools = False
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(stack)
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


async def test_the_conversation_goes_on_after_a_call(stack: Stack, worker: FakeWorker) -> None:
    say(worker, ANSWER)
    message = (await ask(stack)).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    say(worker, "Sunny.")
    answer = await stack.openai.chat.completions.create(
        model=MODEL, messages=[*HI, message, *results], tools=[WEATHER, TIME]
    )
    assert answer.choices[0].message.content == "Sunny."
    _, called, *told = stack.tokenizer.conversations[1].messages
    assert called["tool_calls"][0]["function"]["arguments"]["city"] == "Bern"
    assert [message["tool_call_id"] for message in told] == [call.id for call in message.tool_calls]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_reasoning_is_told_apart(stack: Stack, worker: FakeWorker, is_stream: bool) -> None:
    stack.tokenizer.chat_template, stack.tokenizer.opening = "{{ '<think>' }}…</think>", "<think>\n"
    say(worker, "Hm.\n</think>\n\nYes.")
    answer = await stack.openai.chat.completions.create(model=MODEL, messages=HI, stream=is_stream)
    deltas = [c.choices[0].delta async for c in answer] if is_stream else [answer.choices[0].message]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


async def test_reasoning_stays_content_on_request(stack: Stack, worker: FakeWorker) -> None:
    stack.tokenizer.chat_template, stack.tokenizer.opening = "</think>", "<think>\n"
    say(worker, "Hm.</think>Yes.")
    body = (await stack.chat(include_reasoning=False)).json()
    assert body["choices"][0]["message"]["content"] == "Hm.</think>Yes."


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"name": "x", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("fields", "format", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, "json_schema", SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_object", None),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_object", None),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_grammar": "root ::= 'a'"}, "grammar", "root ::= 'a'"),
        ({"response_format": {"type": "text"}}, None, None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_structured_output(
    stack: Stack, worker: FakeWorker, fields: dict[str, Any], format: str | None, value: Any
) -> None:
    assert (await stack.chat(**fields)).status_code == 200
    structured = worker.requests[0].sampling_params.structured_output
    assert structured.WhichOneof("format") == format
    if format == "json_schema":
        assert json.loads(structured.json_schema) == value
    elif format == "choice":
        assert list(structured.choice.texts) == value
    elif value is not None:
        assert getattr(structured, format) == value
