"""A chat answer's text taken apart as it streams: reasoning, content, and calls of tools.

    <think> reasoning </think> content <tool_call> {"name": …, "arguments": …} </tool_call> …

A text that may become a tag is held back. Blanks around tags belong to nobody. What stands between the tags
of a call may be one call or a list of them; anything else, and calls of functions that nobody offered, stay
content. A call's name and arguments are told as they are written where that is possible.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.call_reader import CallPiece, CallReader, ToolCall, open_call

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
DECODER = json.JSONDecoder()


@dataclass
class Parts:
    """What a piece of text turned out to be. `calls` are those that became whole, `pieces` how they grew."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    pieces: list[CallPiece] = field(default_factory=list, compare=False)

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            self.content + other.content,
            self.reasoning + other.reasoning,
            self.calls + other.calls,
            self.pieces + other.pieces,
        )

    def add_call(self, call: ToolCall) -> None:
        self.calls.append(call)
        self.pieces.append(CallPiece(call.name, call.arguments))

    def extend_call(self, arguments: str) -> None:
        """More of the call that was begun last."""
        if self.pieces:
            last = self.pieces[-1]
            self.pieces[-1] = CallPiece(last.name, last.arguments + arguments)
        elif arguments:
            self.pieces.append(CallPiece(None, arguments))


@dataclass(frozen=True)
class ChatSyntax:
    """What to look for. `functions` are the names that may be called.

    `opens_in_reasoning`: the prompt ends inside of <think>. `is_forced_call`: the whole answer is a JSON list
    of calls, because the engine lets the model write nothing else.
    """

    has_reasoning: bool = False
    has_response_tags: bool = False
    opens_in_reasoning: bool = False
    functions: Collection[str] = ()
    is_forced_call: bool = False

    @property
    def is_plain(self) -> bool:
        """All of the text is content."""
        return not (self.has_reasoning or self.has_response_tags or self.functions)

    @property
    def content_tags(self) -> tuple[str, ...]:
        """Tags that end a run of content."""
        return (
            *((THINK, END_THINK) if self.has_reasoning else ()),
            *((CALL,) if self.functions else ()),
            *((RESPONSE, END_RESPONSE) if self.has_response_tags else ()),
        )


class _State(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALL = auto()
    FORCED_CALL = auto()
    ARGUMENTS = auto()
    TAIL = auto()


END_TAGS = {_State.REASONING: (END_THINK,), _State.CALL: (END_CALL,)}


class ChatParser:
    """One answer: `feed` its text piece by piece, then `finish`."""

    def __init__(self, syntax: ChatSyntax) -> None:
        self._syntax = syntax
        self._state = _State.CONTENT
        if syntax.is_forced_call:
            self._state = _State.FORCED_CALL
        elif syntax.opens_in_reasoning:
            self._state = _State.REASONING
        self._buffer = ""
        self._blanks = ""
        self._is_fresh = True
        self._call = CallReader("")

    def feed(self, text: str) -> Parts:
        """What became certain with `text`."""
        self._buffer += text
        parts = Parts()
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> Parts:
        """What was held back."""
        parts = Parts()
        rest, self._buffer = self._buffer, ""
        if self._state is _State.ARGUMENTS:
            parts.calls.append(ToolCall(self._call.name, self._call.arguments))
        if self._state in (_State.ARGUMENTS, _State.TAIL):
            return parts
        if self._state is _State.FORCED_CALL:
            rest = rest.strip(" \n\t[],")
        self._take_run(rest, parts, end_tag="")
        return parts

    def _advance(self, parts: Parts) -> bool:
        """Takes one run of text from the buffer; False when more text is needed."""
        if self._state is _State.ARGUMENTS:
            return self._take_arguments(parts)
        if self._state is _State.TAIL:
            return self._skip_tail()
        if self._state in (_State.CALL, _State.FORCED_CALL) and self._open_call(parts):
            return True
        if self._state is _State.FORCED_CALL:
            return self._take_object(parts)
        return self._take_tagged(parts)

    def _take_tagged(self, parts: Parts) -> bool:
        tags = END_TAGS.get(self._state, self._syntax.content_tags)
        place, tag = find_first(self._buffer, tags)
        if tag is None and self._state is _State.CALL:
            return False
        run, self._buffer = self._buffer[:place], self._buffer[place + len(tag or "") :]
        self._take_run(run, parts, tag or "")
        if tag is not None:
            self._state = {THINK: _State.REASONING, CALL: _State.CALL}.get(tag, _State.CONTENT)
            self._blanks, self._is_fresh = "", True
        return tag is not None

    def _take_run(self, run: str, parts: Parts, end_tag: str) -> None:
        if self._state is _State.REASONING:
            parts.reasoning += self._without_blanks(run)
            return
        if self._state is _State.CALL:
            calls = parse_calls(run, self._syntax.functions)
            for call in calls or ():
                parts.add_call(call)
            run = "" if calls else f"{CALL}{run}{end_tag}"
        parts.content += self._without_blanks(run)

    def _without_blanks(self, text: str) -> str:
        """Blanks at the start of a run go; those at its end wait for something to follow them."""
        text = self._blanks + (text.lstrip() if self._is_fresh else text)
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        self._is_fresh = self._is_fresh and not kept
        return kept

    def _take_object(self, parts: Parts) -> bool:
        """The next call of a list that is still being written."""
        start = self._buffer.find("{")
        try:
            value, end = DECODER.raw_decode(self._buffer, start)
        except (ValueError, RecursionError):
            return False
        text, self._buffer = self._buffer[start:end], self._buffer[end:]
        call = parse_call(value, self._syntax.functions)
        if call:
            parts.add_call(call)
        else:
            parts.content += text
        return True

    def _open_call(self, parts: Parts) -> bool:
        """Begins a call that can be told before it is whole."""
        opened = open_call(self._buffer, self._syntax.functions)
        if opened is None:
            return False
        self._call, self._buffer = opened
        parts.pieces.append(CallPiece(self._call.name, ""))
        self._state = _State.ARGUMENTS
        return True

    def _take_arguments(self, parts: Parts) -> bool:
        count = self._call.take(self._buffer)
        parts.extend_call(self._buffer[:count])
        self._buffer = self._buffer[count:]
        if self._call.is_over:
            parts.calls.append(ToolCall(self._call.name, self._call.arguments))
            self._state = _State.TAIL
        return self._call.is_over

    def _skip_tail(self) -> bool:
        """What closes a call is nobody's."""
        end = "}" if self._syntax.is_forced_call else END_CALL
        _, found, after = self._buffer.partition(end)
        if found:
            self._buffer, self._blanks, self._is_fresh = after, "", True
            self._state = _State.FORCED_CALL if self._syntax.is_forced_call else _State.CONTENT
        return bool(found)


def find_first(text: str, tags: tuple[str, ...]) -> tuple[int, str | None]:
    """Where the first tag begins, and which; without one, where an end that may become one begins."""
    found = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    if found:
        return min(found)
    longest = max(map(len, tags), default=1) - 1
    tail = text[len(text) - min(longest, len(text)) :]
    place = tail.find("<")
    while place >= 0:
        if any(tag.startswith(tail[place:]) for tag in tags):
            return len(text) - len(tail) + place, None
        place = tail.find("<", place + 1)
    return len(text), None


def parse_calls(text: str, functions: Collection[str]) -> list[ToolCall] | None:
    """The calls that `text` is the JSON of; None if it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = [parse_call(item, functions) for item in (value if isinstance(value, list) else [value])]
    kept = [call for call in calls if call is not None]
    return kept if kept and len(kept) == len(calls) else None


def parse_call(value: object, functions: Collection[str]) -> ToolCall | None:
    if not isinstance(value, dict) or value.get("name") not in functions:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
