"""What the two kinds of vocabulary files have in common: text that is only text, to ids and to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokenizer_svc.added_tokens import AddedTokens, Segment
from tokenizer_svc.vocabulary import Vocabulary


class TextModel(Protocol):
    """A loaded vocabulary.

    Its own segmentation never makes an added token out of text: those enter as ids. `prefix_ids` and
    `suffix_ids` are what "add special tokens" puts around a text.
    """

    kind: str
    added: AddedTokens
    vocabulary: Vocabulary
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Ids of the texts, and the ids between them as they are."""

    def encode_batch(self, batch: Sequence[Sequence[Segment]]) -> list[list[int]]:
        """The same for many, in less time."""


def byte_table(size: int, pieces: dict[int, bytes]) -> tuple[bytes, ...]:
    """`pieces` by id, b"" where there is none."""
    return tuple(pieces.get(token_id, b"") for token_id in range(size))
