"""An answer's parts are the same however its text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.call_reader import CallPiece, ToolCall
from gateway.chat_parser import ChatParser, ChatSyntax, Parts

TOOLS = ChatSyntax(functions=("f", "g"))
THINKING = ChatSyntax(has_reasoning=True, has_response_tags=True, functions=("f",))
FORCED = ChatSyntax(functions=("f", "g"), is_forced_call=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}</"}}\n</tool_call>'
F, G = ToolCall("f", '{"a": "}</"}'), ToolCall("g", "{}")


def parse(syntax: ChatSyntax, *pieces: str) -> Parts:
    parser, whole = ChatParser(syntax), Parts()
    for parts in [*map(parser.feed, pieces), parser.finish()]:
        whole += parts
    return whole


@pytest.mark.parametrize(
    ("syntax", "text", "expected"),
    [
        (TOOLS, "hello  world\n", Parts("hello  world")),
        (TOOLS, "a < b <tool", Parts("a < b <tool")),
        (TOOLS, f"\n\n{CALL}\n", Parts(calls=[F])),
        (TOOLS, f"Let me see.\n{CALL}\n{CALL}", Parts("Let me see.", calls=[F, F])),
        (TOOLS, '<tool_call>[{"name":"g"}, {"name":"g","parameters":{}}]</tool_call>', Parts(calls=[G, G])),
        (TOOLS, '<tool_call>{"name":"f","arguments":"{}"}', Parts(calls=[ToolCall("f", "{}")])),
        (TOOLS, '<tool_call>{"name": "f"', Parts('<tool_call>{"name": "f"')),
        (TOOLS, "<tool_call>nothing</tool_call>", Parts("<tool_call>nothing</tool_call>")),
        (TOOLS, '<tool_call>{"name":"h"}</tool_call>!', Parts('<tool_call>{"name":"h"}</tool_call>!')),
        (TOOLS, "<think>no</think>", Parts("<think>no</think>")),
        (THINKING, "<think>\nwhy\n</think>\n\nso", Parts("so", "why")),
        (THINKING, f"<think>a</think><response>\nb\n</response>{CALL}", Parts("b", "a", [F])),
        (THINKING, "<think>never ends", Parts("", "never ends")),
        (ChatSyntax(has_reasoning=True, opens_in_reasoning=True), "why\n</think>\nso", Parts("so", "why")),
        (FORCED, '[{"name":"g","arguments":{}},\n{"name":"g"}]', Parts(calls=[G, G])),
        (TOOLS, '<tool_call>{"name":"f","arguments":{"a": 1', Parts(calls=[ToolCall("f", '{"a": 1')])),
        (
            TOOLS,
            '<tool_call>{"name":"f","arguments":{"a":"\\"}</tool_call>"}}</tool_call>!',
            Parts("!", calls=[ToolCall("f", '{"a":"\\"}</tool_call>"}')]),
        ),
        (
            TOOLS,
            '<tool_call>{"name":"g","arguments":{</tool_call>so',
            Parts("so", calls=[ToolCall("g", "{")]),
        ),
        (FORCED, '[{"name":"g","arguments":{}},{"na', Parts('{"na', calls=[G])),
    ],
)
def test_parts_in_one_piece_and_letter_by_letter(syntax: ChatSyntax, text: str, expected: Parts) -> None:
    assert parse(syntax, text) == expected
    assert parse(syntax, *text) == expected


def test_a_calls_name_and_arguments_are_told_as_they_are_written() -> None:
    parser = ChatParser(TOOLS)
    texts = ['<tool_call>{"name": "f", "argu', 'ments": {"ci', 'ty": "Bern"', "}}</tool_call>"]
    assert [parser.feed(text).pieces for text in texts] == [
        [],
        [CallPiece("f", '{"ci')],
        [CallPiece(None, 'ty": "Bern"')],
        [CallPiece(None, "}")],
    ]


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALLS = ('{"name": "f"}', '{"name":"f","arguments":{')
FRAGMENTS = st.lists(st.sampled_from((*TAGS, *CALLS, "</t", "}", '"', *"x \n<é[]")), max_size=12).map("".join)


@given(FRAGMENTS, st.lists(st.integers(1, 5), max_size=20), st.sampled_from([TOOLS, THINKING, FORCED]))
def test_cuts_do_not_matter(text: str, sizes: list[int], syntax: ChatSyntax) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parse(syntax, *pieces, rest) == parse(syntax, text)


@given(st.text().filter(lambda text: text == text.strip() and "<" not in text))
def test_text_without_tags_is_content(text: str) -> None:
    assert parse(THINKING, text) == Parts(text)
