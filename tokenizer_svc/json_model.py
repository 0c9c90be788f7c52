"""`tokenizer.json`: Hugging Face's tokenizers segments the text between added tokens.

The library would find added tokens in any text. Here it gets a vocabulary in which every added token bears an
alias that nobody can type; who wants an added token writes its alias, so that one call still sees the whole
text, and what the library does at its beginning and beside added tokens stays as it is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from tokenizer_svc.added_tokens import AddedToken, Segment
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.model_folder import ModelFolder, parse_added_tokens
from tokenizer_svc.piece_bytes import read_decoder
from tokenizer_svc.text_model import byte_table
from tokenizer_svc.vocabulary import Vocabulary

FILE_NAME = "tokenizer.json"


class JsonModel:
    """A `tokenizers.Tokenizer` for plain text, and the added tokens around it."""

    kind = "tokenizer.json"

    def __init__(self, folder: ModelFolder) -> None:
        path = folder.path / FILE_NAME
        spec = folder.read_json(FILE_NAME)
        folder.check()
        try:
            whole = _from_spec(spec)
            listed = list(parse_added_tokens(spec.get("added_tokens") or []))
            decoder = read_decoder(spec.get("decoder"))
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerLoadError([f"{path}: {error}"]) from error
        self.added = folder.added_tokens(listed, whole.token_to_id)
        folder.check()
        self.prefix_ids, self.suffix_ids = _surroundings(whole)
        aliases = {
            token: f"\U000ffffd{secrets.token_hex(16)}{token.id}\U000ffffd" for token in self.added.tokens
        }
        self._plain = _without_added_tokens(spec, aliases)
        self._alias_of = {token.id: alias for token, alias in aliases.items()}
        self._id_of = {self._plain.token_to_id(alias): token.id for token, alias in aliases.items()}
        pieces = {token_id: decoder.piece_bytes(piece) for piece, token_id in whole.get_vocab().items()}
        pieces |= {token.id: token.content.encode() for token in self.added.tokens}
        self.vocabulary = Vocabulary(
            byte_table(max(pieces) + 1, pieces),
            special_ids=self.added.special_ids,
            added_ids=frozenset(token.id for token in self.added.tokens),
            drops_first_space=decoder.drops_first_space,
        )

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        return self._real_ids(self._plain.encode(self._with_aliases(segments), add_special_tokens=False).ids)

    def encode_batch(self, batch: Sequence[Sequence[Segment]]) -> list[list[int]]:
        texts = [self._with_aliases(segments) for segments in batch]
        encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [self._real_ids(encoding.ids) for encoding in encodings]

    def _with_aliases(self, segments: Iterable[Segment]) -> str:
        return "".join(
            segment if isinstance(segment, str) else self._alias_of[segment] for segment in segments
        )

    def _real_ids(self, ids: list[int]) -> list[int]:
        return [self._id_of.get(token_id, token_id) for token_id in ids]


def _from_spec(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer of the specification; ValueError with the library's words if it is none."""
    spec = {**spec, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"not a tokenizer that the tokenizers library can read: {error}") from error


def _without_added_tokens(spec: dict[str, Any], aliases: dict[AddedToken, str]) -> tokenizers.Tokenizer:
    spec = {**spec, "added_tokens": [], "post_processor": None, "model": dict(spec["model"])}
    if spec["model"].get("type") == "Unigram":
        # Any entry of a Unigram vocabulary is matched in text, an added token's as well.
        renamed = {token.content: alias for token, alias in aliases.items()}
        spec["model"]["vocab"] = [
            [renamed.get(piece, piece), score] for piece, score in spec["model"]["vocab"]
        ]
    plain = _from_spec(spec)
    plain.add_tokens(
        [tokenizers.AddedToken(alias, normalized=False, special=False) for alias in aliases.values()]
    )
    return plain


def _surroundings(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()
