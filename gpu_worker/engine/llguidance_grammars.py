"""Grammars by llguidance: a mask takes some fifty microseconds, on threads that need no GIL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from gpu_worker.engine.errors import RequestError
from gpu_worker.sampling_params import StructuredOutput

_MAX_GRAMMARS = 128  # kept, so that the next request of the same form need not wait
_MAX_MESSAGE_CHARS = 300
# A model that can go on with white space for ever sometimes does.
_WHITESPACE = {"whitespace_pattern": r"[ \t\n\r]{1,32}"}


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The bytes behind each token id, b"" where it prints nothing; special tokens never match text."""

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]


class LlguidanceConstraint:
    """One completion's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def error(self) -> str | None:
        return _brief(self.matcher.get_error()) if self.matcher.is_error() else None

    def advance(self, token_id: int) -> bool:
        return self.matcher.consume_token(token_id) and not self.matcher.is_stopped()


class LlguidanceGrammars:
    """Reads the vocabulary when the first request needs it. Safe to use from several threads."""

    def __init__(
        self, load_texts: Callable[[], TokenTexts], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._load_texts = load_texts
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._executor = LLExecutor()
        self._prototype = lru_cache(_MAX_GRAMMARS)(self._make_prototype)

    def compile(self, wanted: StructuredOutput) -> LlguidanceConstraint:
        return LlguidanceConstraint(self._prototype(wanted).deep_copy())

    def fill(self, constraints: Sequence[Any], masks_XW: NDArray[np.int32]) -> None:
        numbered = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
        fill_next_token_bitmask_par(self._executor, numbered, masks_XW)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        texts = _GreedyTokenizer(self._load_texts(), self._vocab_size, self._eos_token_ids[0])
        return LLTokenizer(TokenizerWrapper(texts), self._vocab_size, self._eos_token_ids)

    def _make_prototype(self, wanted: StructuredOutput) -> LLMatcher:
        try:
            grammar = _write_grammar(wanted)
        except ValueError as error:
            raise RequestError("structured_output", f"cannot be read: {_brief(str(error))}") from error
        matcher = LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        if matcher.is_error():
            raise RequestError("structured_output", f"cannot be followed: {_brief(matcher.get_error())}")
        return matcher


class _GreedyTokenizer:
    """What llguidance asks of a tokenizer. Text that a grammar forces is cut into the longest tokens."""

    bos_token_id = None

    def __init__(self, texts: TokenTexts, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        known = list(texts.token_bytes[:vocab_size])
        self.tokens = known + [b""] * (vocab_size - len(known))
        self.special_token_ids = sorted(id for id in texts.special_ids if id < vocab_size)
        self._ids = {data: id for id, data in enumerate(self.tokens) if data and id not in texts.special_ids}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        token_ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:  # a byte that no token stands for
                return token_ids
            token_ids.append(self._ids[text[start:end]])
            start = end
        return token_ids


def _write_grammar(wanted: StructuredOutput) -> str:
    """The grammar in llguidance's own notation."""
    if wanted.json_object or wanted.json_schema is not None:
        schema = '{"type": "object"}' if wanted.json_schema is None else wanted.json_schema
        return LLMatcher.grammar_from_json_schema(schema, overrides=_WHITESPACE)  # type: ignore[arg-type]
    if wanted.regex is not None:
        return grammar_from("regex", _without_anchors(wanted.regex))
    if wanted.grammar is not None:
        return grammar_from("grammar", wanted.grammar)
    return grammar_from("choice", json.dumps(wanted.choice))


def _without_anchors(regex: str) -> str:
    """The whole text is matched anyway."""
    regex = regex.removeprefix("^")
    return regex[:-1] if regex.endswith("$") and not regex.endswith("\\$") else regex


def _brief(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE_CHARS]
