"""Tokens that are found in the text before the model's own segmentation sees it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

# Text that is only text, or the id of an added token.
Segment: TypeAlias = str | int


@dataclass(frozen=True)
class AddedToken:
    """One entry of added_tokens; the flags mean what they mean in Hugging Face's tokenizers.

    `is_special` marks a control token, one that steers the model rather than being written or read.
    """

    id: int
    content: str
    is_special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class AddedTokens:
    """The added tokens of one tokenizer, and the two ways to cut them out of a text."""

    tokens: tuple[AddedToken, ...]
    special_ids: frozenset[int] = field(init=False)
    _by_content: dict[str, AddedToken] = field(init=False)
    _any: re.Pattern[str] = field(init=False)
    _ordinary: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        ordinary = [token.content for token in self.tokens if not token.is_special]
        vars(self).update(
            special_ids=frozenset(token.id for token in self.tokens if token.is_special),
            _by_content={token.content: token for token in self.tokens},
            _any=compile_any(token.content for token in self.tokens),
            _ordinary=compile_any(ordinary),
        )

    def split(self, text: str, *, parse_special: bool) -> list[Segment]:
        """Cuts the added tokens out, leftmost and longest first; special ones only if `parse_special`."""
        segments: list[Segment] = []
        end = 0
        strip_next = False
        for match in (self._any if parse_special else self._ordinary).finditer(text):
            token = self._by_content[match[0]]
            if token.single_word and _is_inside_word(text, match):
                continue
            before = _stripped(text[end : match.start()], left=strip_next, right=token.lstrip)
            segments += [before, token.id] if before else [token.id]
            end, strip_next = match.end(), token.rstrip
        rest = _stripped(text[end:], left=strip_next, right=False)
        return [*segments, rest] if rest else segments

    def find_ids(self, contents: Iterable[str | None]) -> tuple[int, ...]:
        """Ids of the tokens with these contents, unknown ones and None passed over."""
        found = (self._by_content.get(content) for content in contents if content is not None)
        return tuple(token.id for token in found if token is not None)


def _stripped(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _is_inside_word(text: str, match: re.Match[str]) -> bool:
    around = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
    return any(char.isalnum() or char == "_" for char in around)


def join_text(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same segments with neighbouring texts made one, so that tokens may span their seam."""
    text = ""
    for segment in segments:
        if isinstance(segment, str):
            text += segment
            continue
        if text:
            yield text
            text = ""
        yield segment
    if text:
        yield text


def compile_any(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the words, the longest where several begin; for no words, one that fails."""
    words = sorted({word for word in words if word})
    return re.compile(_trie_pattern(words, 0) if words else r"(?!)")


def _trie_pattern(words: Collection[str], depth: int) -> str:
    r"""`words`, sorted and equal up to `depth`, as a trie: `ab abc ad` becomes `a(?:b(?:c)?|d)`.

    An alternation of a thousand reserved tokens would be tried branch by branch at every character; a trie
    looks at each character once.
    """
    branches: dict[str, list[str]] = {}
    is_word = False
    for word in words:
        if len(word) == depth:
            is_word = True
        else:
            branches.setdefault(word[depth], []).append(word)
    options = [_branch_pattern(members, depth) for members in branches.values()]
    if not options:
        return ""
    if len(options) == 1 and not is_word:
        return options[0]
    return f"(?:{'|'.join(options)}){'?' if is_word else ''}"


def _branch_pattern(words: list[str], depth: int) -> str:
    """Words that share the character at `depth`: as far as they agree, then what follows."""
    first, last = words[0], words[-1]
    end = depth + 1
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return re.escape(first[depth:end]) + _trie_pattern(words, end)
