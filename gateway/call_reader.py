"""A call of a tool while it is written: its name once it is there, its arguments piece by piece."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# A call whose name comes first and whose arguments are an object can be told before it is whole.
HEAD = re.compile(r'[\s\[,]*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallPiece:
    """The beginning of a call if there is a name; otherwise more of the last call's arguments."""

    name: str | None
    arguments: str


class CallReader:
    """Reads the arguments' object, from its first brace to the one that closes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments = ""
        self.is_over = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the arguments. A tag outside of strings ends them too."""
        count = next((end for place, char in enumerate(text) if (end := self._end(place, char)) >= 0), None)
        self.is_over = count is not None
        taken = text[:count]
        self.arguments += taken
        return len(taken)

    def _end(self, place: int, char: str) -> int:
        """Where the object ends if it ends at this character, otherwise -1."""
        if self._is_in_string:
            self._is_in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
            return -1
        if char == "<":
            return place
        self._is_in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return -1 if self._depth else place + 1


def open_call(text: str, functions: Collection[str]) -> tuple[CallReader, str] | None:
    """The call that `text` begins with, and what follows its head; None if that cannot be told (yet)."""
    head = HEAD.match(text)
    if head is None or head[1] not in functions:
        return None
    return CallReader(head[1]), text[head.end() :]
