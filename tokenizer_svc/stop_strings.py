"""Finds the first stop string in text that arrives in pieces, and holds back what may become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One Knuth-Morris-Pratt automaton a stop string, so that every character is looked at once.

    The match that ends first wins, of those that end together the longest: what a reader who takes the text a
    character at a time would see, whatever pieces it arrives in.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._borders = [_borders(word) for word in self._stop]
        self._states = [0] * len(self._stop)  # characters of each stop string that the text now ends in
        self._first_chars = frozenset(word[0] for word in self._stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that no stop string can reach any more, up to the match if there is one; and the match."""
        if not self._held and self._first_chars.isdisjoint(text):
            return text, None
        for index, char in enumerate(text):
            if matched := self._advance(char):
                return (self._held + text[: index + 1])[: -len(matched)], matched
        text = self._held + text
        num_safe = len(text) - max(self._states)
        self._held = text[num_safe:]
        return text[:num_safe], None

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str:
        """Feeds one character to every automaton; the longest stop string that it completes, or ""."""
        matched = ""
        for index, (word, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            state = self._states[index]
            while state and word[state] != char:
                state = borders[state - 1]
            state += word[state] == char
            self._states[index] = state
            if state == len(word) > len(matched):
                matched = word
        return matched


def _borders(word: str) -> list[int]:
    """For every prefix of `word`, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in word[1:]:
        length = borders[-1]
        while length and word[length] != char:
            length = borders[length - 1]
        borders.append(length + (word[length] == char))
    return borders
