"""What each token id prints: bytes, joined into text without ever cutting a character in two."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A character is at most four bytes and a token at least one: no more of a prompt reaches into what follows.
MAX_CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class Vocabulary:
    """The bytes behind every id; a decoded text is their concatenation read as UTF-8, bad bytes as U+FFFD.

    `token_bytes[id]` is b"" for ids that print nothing. `special_ids` are left out on request; `added_ids`
    end a run of ordinary text. `drops_first_space` undoes the space that sentencepiece puts before a text, at
    the beginning and, if `drops_space_after_added`, at the beginning of every run.
    """

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]
    added_ids: frozenset[int]
    drops_first_space: bool = False
    drops_space_after_added: bool = False

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        joiner = TextJoiner(self, skip_special_tokens=skip_special_tokens)
        return "".join([joiner.push(token_id) for token_id in token_ids]) + joiner.finish()

    def fixed_texts(self) -> list[str]:
        """By id, the text that a settled joiner prints for it and stays settled; "" if there is none such."""
        loose = self.special_ids | self.added_ids
        return ["" if i in loose else _whole_text(data) for i, data in enumerate(self.token_bytes)]


class TextJoiner:
    """Ids in, whole characters out, in constant time a token."""

    def __init__(
        self, vocabulary: Vocabulary, *, skip_special_tokens: bool, prefix_token_ids: Sequence[int] = ()
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = vocabulary.drops_first_space and len(prefix_token_ids) <= MAX_CONTEXT_TOKENS
        for token_id in prefix_token_ids[-MAX_CONTEXT_TOKENS:]:
            self.push(token_id)

    @property
    def is_inside_character(self) -> bool:
        """Bytes of an unfinished character wait."""
        return bool(self._utf8.getstate()[0])

    @property
    def is_settled(self) -> bool:
        """What the next id prints does not depend on the ids before it."""
        return not self._drops_space and not self.is_inside_character

    def push(self, token_id: int) -> str:
        """The characters that are complete with this token; ids outside the vocabulary print nothing."""
        vocabulary = self._vocabulary
        data = b""
        if token_id not in self._skipped and 0 <= token_id < len(vocabulary.token_bytes):
            data = vocabulary.token_bytes[token_id]
        if token_id in vocabulary.added_ids:
            self._drops_space = vocabulary.drops_space_after_added or (self._drops_space and not data)
        elif self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD for the bytes that no character followed."""
        return self._utf8.decode(b"", final=True)


def _whole_text(data: bytes) -> str:
    """The text of bytes that are whole characters, else ""."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""
