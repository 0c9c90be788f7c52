"""The completions that one Detokenize stream turns into text."""

from __future__ import annotations

from collections.abc import Sequence

from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from tokenizer_svc.detokenizer import IncrementalDetokenizer, Piece
from tokenizer_svc.errors import InputError
from tokenizer_svc.settings import RequestLimits
from tokenizer_svc.tokenizer import Tokenizer


class DetokenizeSessions:
    """Sessions by id. What is wrong with one ends that one, with `error_message`; the others go on."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._open: dict[int, IncrementalDetokenizer] = {}

    def push_all(self, chunks: Sequence[pb.DetokenizeChunk]) -> pb.DetokenizeResponse:
        """One piece for every chunk, in order."""
        return pb.DetokenizeResponse(pieces=[self.push(chunk) for chunk in chunks])

    def push(self, chunk: pb.DetokenizeChunk) -> pb.DetokenizePiece:
        try:
            session = self._session(chunk)
        except InputError as error:
            self._open.pop(chunk.session_id, None)
            return pb.DetokenizePiece(session_id=chunk.session_id, finished=True, error_message=str(error))
        piece = session.push(chunk.token_ids)
        if chunk.end and not piece.finished:
            last = session.finish()
            piece = Piece(piece.text + last.text, last.matched_stop, last.num_tokens, finished=True)
        if piece.finished:
            del self._open[chunk.session_id]
        return pb.DetokenizePiece(
            session_id=chunk.session_id,
            text=piece.text,
            matched_stop=piece.matched_stop,
            num_tokens=piece.num_tokens,
            finished=piece.finished,
            settled=piece.settled,
        )

    def _session(self, chunk: pb.DetokenizeChunk) -> IncrementalDetokenizer:
        """The session of the chunk, opened if it comes with options."""
        session = self._open.get(chunk.session_id)
        if session is None and not chunk.HasField("options"):
            raise InputError("session_id", f"session {chunk.session_id} is not open, and options are missing")
        if session is not None and chunk.HasField("options"):
            raise InputError("options", f"session {chunk.session_id} is open already, with other options")
        if session is None:
            session = self._open[chunk.session_id] = self._new_session(chunk.options)
        return session

    def _new_session(self, options: pb.DetokenizeOptions) -> IncrementalDetokenizer:
        if len(self._open) >= self._limits.max_sessions:
            limit = self._limits.max_sessions
            raise InputError("session_id", f"{limit} sessions are open on this stream, which is the limit")
        self._check_stop(options.stop)
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=not options.HasField("skip_special_tokens") or options.skip_special_tokens,
            stop=options.stop,
            include_stop=options.include_stop,
            prefix_token_ids=options.prefix_token_ids,
        )

    def _check_stop(self, stop: Sequence[str]) -> None:
        limits = self._limits
        if len(stop) > limits.max_stop_strings:
            raise InputError(
                "options.stop", f"{len(stop)} stop strings; the limit is {limits.max_stop_strings}"
            )
        for index, text in enumerate(stop):
            if not 0 < len(text) <= limits.max_stop_chars:
                raise InputError(
                    f"options.stop[{index}]",
                    f"a stop string has 1 to {limits.max_stop_chars} characters, this one {len(text)}",
                )
