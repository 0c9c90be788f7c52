"""Token ids to text as they arrive: whole characters only, up to the first stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizer_svc.stop_strings import StopStrings
from tokenizer_svc.tokenizer import Tokenizer
from tokenizer_svc.vocabulary import TextJoiner


@dataclass(frozen=True)
class Piece:
    """New text of a completion.

    `num_tokens` counts the ids whose text is out entirely; those of a matched stop string count. `settled`:
    nothing is held back, and what comes next does not depend on it.
    """

    text: str
    matched_stop: str | None
    num_tokens: int
    finished: bool
    settled: bool = False


class IncrementalDetokenizer:
    """The text of one completion.

    The pieces join to `tokenizer.decode` of all ids, cut at the stop string that is completed first. Text
    that may begin a stop string, and bytes of an unfinished character, are held back until it shows.
    `prefix_token_ids` come before the completion: a character may begin there, and so may a run of text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        prefix_token_ids: Sequence[int] = (),
    ) -> None:
        self._joiner = TextJoiner(
            tokenizer.vocabulary, skip_special_tokens=skip_special_tokens, prefix_token_ids=prefix_token_ids
        )
        self._stop = StopStrings(stop)
        self._include_stop = include_stop
        self._matched_stop: str | None = None
        self._finished = False
        # Ids whose text is not out yet: the number of characters that must be out first.
        self._unprinted: deque[int] = deque()
        self._num_decoded_chars = 0
        self._num_released_chars = 0
        self._num_tokens = 0

    def push(self, token_ids: Iterable[int]) -> Piece:
        """The text that these ids complete. After the end, ids are passed over and pieces are empty."""
        text = ""
        for token_id in token_ids:
            if self._finished:
                break
            text += self._push_one(token_id)
        return self._piece(text)

    def finish(self) -> Piece:
        """No more ids: everything that was held back."""
        if self._finished:
            return self._piece("")
        text = self._feed(self._joiner.finish())
        if self._matched_stop is None:
            text += self._stop.finish()
        self._end()
        return self._piece(text)

    def _push_one(self, token_id: int) -> str:
        decoded = self._joiner.push(token_id)
        self._num_decoded_chars += len(decoded)
        self._unprinted.append(self._num_decoded_chars + self._joiner.is_inside_character)
        released = self._feed(decoded)
        self._num_released_chars += len(released)
        while self._unprinted and self._unprinted[0] <= self._num_released_chars:
            self._unprinted.popleft()
            self._num_tokens += 1
        return released

    def _feed(self, decoded: str) -> str:
        released, self._matched_stop = self._stop.push(decoded)
        if self._matched_stop is None:
            return released
        self._end()
        return released + self._matched_stop if self._include_stop else released

    def _end(self) -> None:
        self._finished = True
        self._num_tokens += len(self._unprinted)
        self._unprinted.clear()

    def _piece(self, text: str) -> Piece:
        settled = not (self._finished or self._unprinted) and self._joiner.is_settled
        return Piece(text, self._matched_stop, self._num_tokens, self._finished, settled)
