"""`tokenizer.model`: sentencepiece segments the text between added tokens, as ERNIE-4.5's tokenizer does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from tokenizer_svc.added_tokens import AddedToken, Segment
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.model_folder import ModelFolder
from tokenizer_svc.text_model import byte_table
from tokenizer_svc.vocabulary import Vocabulary

FILE_NAME = "tokenizer.model"
SPACE = "▁"


class SentencePieceModel:
    """A sentencepiece model and the added tokens around it."""

    kind = "sentencepiece"

    def __init__(self, folder: ModelFolder) -> None:
        proto = _read_proto(folder)
        types = proto.SentencePiece
        ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
        control = [
            AddedToken(token_id, piece.piece, is_special=True)
            for token_id, piece in enumerate(proto.pieces)
            if piece.type in (types.CONTROL, types.UNKNOWN)
        ]
        self.added = folder.added_tokens(control, ids.get)
        folder.check()
        self.vocabulary = self._read_vocabulary(proto)
        bos = folder.special_tokens.get("bos_token") or proto.trainer_spec.bos_piece
        self.prefix_ids = self.added.find_ids([bos]) if _adds_bos(folder) else ()
        adds_eos = folder.read_flag("add_eos_token", False)
        eos = folder.special_tokens.get("eos_token") or proto.trainer_spec.eos_piece
        self.suffix_ids = self.added.find_ids([eos]) if adds_eos else ()
        # A piece of type CONTROL is never matched in text, which is what added tokens must not be.
        for token in self.added.tokens:
            if token.id < len(proto.pieces) and proto.pieces[token.id].type != types.UNKNOWN:
                proto.pieces[token.id].type = types.CONTROL
        self._processor = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, str):
                ids += self._processor.encode(segment)
            else:
                ids.append(segment)
        return ids

    def encode_batch(self, batch: Sequence[Sequence[Segment]]) -> list[list[int]]:
        return [self.encode(segments) for segments in batch]

    def _read_vocabulary(self, proto: Any) -> Vocabulary:
        types = proto.SentencePiece
        pieces = {
            token_id: bytes([int(piece.piece[1:-1], 16)])
            if piece.type == types.BYTE
            else piece.piece.replace(SPACE, " ").encode()
            for token_id, piece in enumerate(proto.pieces)
        }
        pieces |= {token.id: token.content.encode() for token in self.added.tokens}
        return Vocabulary(
            byte_table(max(pieces) + 1, pieces),
            special_ids=self.added.special_ids,
            added_ids=frozenset(token.id for token in self.added.tokens),
            drops_first_space=proto.normalizer_spec.add_dummy_prefix,
            drops_space_after_added=True,
        )


def _read_proto(folder: ModelFolder) -> Any:
    path = folder.path / FILE_NAME
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(path.read_bytes())
        if not proto.pieces:
            raise DecodeError("it has no pieces")
        SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (DecodeError, RuntimeError) as error:
        problem = f"{path}: not a sentencepiece model: {error}"
        raise TokenizerLoadError([*folder.problems, problem]) from error
    except OSError as error:
        raise TokenizerLoadError([*folder.problems, f"{path}: {error.strerror}"]) from error
    return proto


def _adds_bos(folder: ModelFolder) -> bool:
    """Llama's tokenizers begin a text with bos unless told otherwise; ERNIE's and others do when told so."""
    is_llama = str(folder.config.get("tokenizer_class", "")).startswith("Llama")
    return folder.read_flag("add_bos_token", is_llama)
