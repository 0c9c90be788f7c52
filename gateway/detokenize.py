"""Token ids to text: all completions of this process share one Detokenize stream.

session.push ─┐                                 ┌─► sink.on_piece
session.push ─┼─► one request ──► one response ─┼─► sink.on_piece      while a request is out, pushes gather
session.push ─┘                                 └─► sink.on_piece
session.push ──── texts known here ───────────────► sink.on_piece      while the session is settled
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from gateway.deadline import StallWatch
from protos.rpc.errors import (
    DeadlineError,
    InvalidArgumentError,
    ServiceError,
    UnavailableError,
    from_rpc_error,
)
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from protos.wint2.tokenizer.v1 import tokenizer_pb2_grpc

logger = logging.getLogger(__name__)

# A tokenizer that takes longer than this for a batch of tokens is not there any more.
EXCHANGE_SECONDS = 10.0
# A step of many sequences goes in several messages: the first one's text leaves while the next is decoded.
MAX_CHUNKS = 32

Piece = pb.DetokenizePiece
Call = grpc.aio.StreamStreamCall[pb.DetokenizeRequest, pb.DetokenizeResponse]


def tokenizer_lost() -> ServiceError:
    message = "the connection to the tokenizer was lost"
    return UnavailableError(message, reason="TOKENIZER_LOST", retry_after_seconds=1)


class PieceSink(Protocol):
    """Who wants a session's text."""

    def on_piece(self, piece: Piece) -> None:
        """The text that tokens pushed before made printable."""

    def on_lost(self, error: ServiceError) -> None:
        """No more pieces."""


@dataclass
class _Message:
    """Chunks that gather, and whose they are."""

    request: pb.DetokenizeRequest = field(default_factory=pb.DetokenizeRequest)
    sessions: list[DetokenizeSession] = field(default_factory=list)

    def add(self, session: DetokenizeSession) -> pb.DetokenizeChunk:
        self.sessions.append(session)
        return self.request.chunks.add(session_id=session.session_id)


class DetokenizeStream:
    """Opens the stream when first needed, and again after it broke; sessions of a broken stream fail.

    `texts` are those of ids that read the same wherever they stand, "" for others; none until learned.
    """

    def __init__(self, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub) -> None:
        self._stub = stub
        self._session_ids = itertools.count(1)
        self._outbox: deque[_Message] = deque()
        self._unanswered: _Message | None = None
        self._can_send = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self.generation = 0
        self.texts: Sequence[str] = ()

    def open(self) -> None:
        """Opens the stream if it is not; chunks do it too."""
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())

    def session(self, options: pb.DetokenizeOptions, sink: PieceSink) -> DetokenizeSession:
        """Begun at once: by the time that the first token comes it may be settled."""
        session = DetokenizeSession(self, next(self._session_ids), options, sink)
        session.push(())
        return session

    async def decode(self, token_ids: Sequence[int], options: pb.DetokenizeOptions) -> str:
        """The text of ids that are all there."""
        whole = _Whole()
        with self.session(options, whole) as session:
            session.push(token_ids, end=True)
            return (await whole.piece).text

    def chunk(self, session: DetokenizeSession) -> pb.DetokenizeChunk:
        """The session's part of the next message."""
        if not self._outbox or len(self._outbox[-1].sessions) == MAX_CHUNKS:
            self._outbox.append(_Message())
        self._can_send.set()
        self.open()
        return self._outbox[-1].add(session)

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})

    async def _run(self) -> None:
        call = self._stub.Detokenize()
        error: ServiceError | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self._fail(error))
            stack.callback(call.cancel)
            try:
                with StallWatch(EXCHANGE_SECONDS) as watch:
                    stack.callback(asyncio.create_task(self._write(call, watch)).cancel)
                    stack.callback(asyncio.create_task(self._learn()).cancel)
                    while True:
                        self._answer(await call.read(), watch)
            except grpc.aio.AioRpcError as failure:
                if failure.code() is not grpc.StatusCode.UNAVAILABLE:
                    error = from_rpc_error(failure)
            except (asyncio.InvalidStateError, DeadlineError):
                pass

    async def _write(self, call: Call, watch: StallWatch) -> None:
        """Ends with the stream, whose reader knows why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while self._unanswered is not None or not self._outbox:
                    self._can_send.clear()
                    await self._can_send.wait()
                self._unanswered = message = self._outbox.popleft()
                for session in message.sessions:
                    session.on_sent()
                watch.since = asyncio.get_running_loop().time()
                await call.write(message.request)

    async def _learn(self) -> None:
        """What is not known here, the tokenizer is asked for: slower, and the same."""
        try:
            answer = await self._stub.GetTokenTexts(pb.GetTokenTextsRequest(), timeout=EXCHANGE_SECONDS)
            self.texts = list(answer.texts)
        except grpc.aio.AioRpcError as error:
            logger.info("the tokenizer does not tell its tokens' texts: %s", error.details())

    def _answer(self, response: object, watch: StallWatch) -> None:
        if not isinstance(response, pb.DetokenizeResponse) or self._unanswered is None:
            raise asyncio.InvalidStateError("the stream ended")
        sessions, self._unanswered, watch.since = self._unanswered.sessions, None, None
        self._can_send.set()
        for session, piece in zip(sessions, response.pieces, strict=True):
            session.on_piece(piece)

    def _fail(self, error: ServiceError | None) -> None:
        """Every session that waits for an answer gets an error of its own unless there is one for all."""
        self.generation += 1
        self.texts = ()
        messages = [*filter(None, [self._unanswered]), *self._outbox]
        self._unanswered = None
        self._outbox.clear()
        for session in dict.fromkeys(session for message in messages for session in message.sessions):
            session.on_lost(error or tokenizer_lost())


class DetokenizeSession:
    """One completion's text. Use as a context manager: leaving it frees the tokenizer's state."""

    def __init__(
        self, stream: DetokenizeStream, session_id: int, options: pb.DetokenizeOptions, sink: PieceSink
    ) -> None:
        self.session_id = session_id
        self._stream = stream
        self._sink = sink
        self._options: pb.DetokenizeOptions | None = options
        self._stop_starts = frozenset(stop[:1] for stop in options.stop)
        self._generation = stream.generation
        self._chunk: pb.DetokenizeChunk | None = None
        self._is_unanswered = False
        self._is_settled = False
        self._is_over = False
        self._num_told = 0  # tokens that the tokenizer knows to be printed
        self._num_untold = 0  # tokens that it does not hear of

    @property
    def is_waiting(self) -> bool:
        """Whether a piece is still to come for what was pushed."""
        return not self._is_over and (self._chunk is not None or self._is_unanswered)

    def push(self, token_ids: Sequence[int], *, end: bool = False) -> None:
        """Asks for the text that `token_ids` make printable; `end` flushes what was held back.

        The sink may have it before this returns.
        """
        if self._generation != self._stream.generation:
            self.on_lost(tokenizer_lost())
        elif self._is_settled and (text := self._text_of(token_ids)) is not None:
            self._num_untold += len(token_ids)
            self._tell(Piece(text=text, num_tokens=self._num_told, finished=end))
            if end:
                self._send((), end=True)  # frees the tokenizer's state
        else:
            self._send(token_ids, end=end)

    def on_sent(self) -> None:
        self._chunk = None
        self._is_unanswered = True

    def on_piece(self, piece: Piece) -> None:
        self._is_unanswered = False
        self._is_settled = piece.settled and self._chunk is None
        if not self._is_over:
            self._tell(piece)

    def _text_of(self, token_ids: Sequence[int]) -> str | None:
        """Their text if it is known here and may not begin a stop string."""
        texts = self._stream.texts
        parts = [texts[token_id] if token_id < len(texts) else "" for token_id in token_ids]
        text = "".join(parts)
        return text if all(parts) and self._stop_starts.isdisjoint(text) else None

    def _send(self, token_ids: Iterable[int], *, end: bool) -> None:
        self._is_settled = False
        if self._chunk is None:
            self._chunk = self._stream.chunk(self)
            if self._options is not None:
                self._chunk.options.CopyFrom(self._options)
                self._options = None
        self._chunk.token_ids.extend(token_ids)
        if end:
            self._chunk.end = True

    def _tell(self, piece: Piece) -> None:
        self._is_over = piece.finished
        if piece.HasField("error_message"):
            self._sink.on_lost(InvalidArgumentError(piece.error_message))
            return
        self._num_told = piece.num_tokens
        piece.num_tokens += self._num_untold
        self._sink.on_piece(piece)

    def on_lost(self, error: ServiceError) -> None:
        if not self._is_over:
            self._is_over = True
            self._sink.on_lost(error)

    def close(self) -> None:
        """Ends a session whose text nobody wants any more."""
        is_known = self._options is None and self._generation == self._stream.generation
        if is_known and not self._is_over:
            self._send((), end=True)
        self._is_over = True

    def __enter__(self) -> DetokenizeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Whole:
    """A piece that is all there is, to wait for."""

    def __init__(self) -> None:
        self.piece: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()

    def on_piece(self, piece: Piece) -> None:
        if not self.piece.done():
            self.piece.set_result(piece)

    def on_lost(self, error: ServiceError) -> None:
        if not self.piece.done():
            self.piece.set_exception(error)
