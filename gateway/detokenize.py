"""Token ids to text: all completions of this process share one Detokenize stream.

session.push ─┐                 ┌─► piece
session.push ─┼─► one request ──► one response ─┼─► piece        while a request is out, pushes gather
session.push ─┘                 └─► piece
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import grpc

from protos.rpc.errors import InvalidArgumentError, ServiceError, UnavailableError, from_rpc_error
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from protos.wint2.tokenizer.v1 import tokenizer_pb2_grpc

# A tokenizer that takes longer than this for a batch of tokens is not there any more.
EXCHANGE_SECONDS = 10.0

Piece = pb.DetokenizePiece
Call = grpc.aio.StreamStreamCall[pb.DetokenizeRequest, pb.DetokenizeResponse]
LOST = UnavailableError(
    "the connection to the tokenizer was lost", reason="TOKENIZER_LOST", retry_after_seconds=1
)


class DetokenizeStream:
    """Opens the stream when first needed, and again after it broke; sessions of a broken stream fail."""

    def __init__(self, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub) -> None:
        self._stub = stub
        self._session_ids = itertools.count(1)
        self._waiting: dict[int, tuple[pb.DetokenizeChunk, asyncio.Future[Piece]]] = {}
        self._has_work = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self.generation = 0

    def session(self, options: pb.DetokenizeOptions) -> DetokenizeSession:
        return DetokenizeSession(self, next(self._session_ids), options)

    def send(self, chunk: pb.DetokenizeChunk) -> asyncio.Future[Piece]:
        """Queues the chunk; the future ends with its piece."""
        future: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()
        self._waiting[chunk.session_id] = chunk, future
        self._has_work.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return future

    def forget(self, session_id: int) -> None:
        """Ends a session whose text nobody wants any more."""
        chunk, _ = self._waiting.pop(session_id, (pb.DetokenizeChunk(session_id=session_id), None))
        chunk.end = True
        self.send(chunk)

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})

    async def _run(self) -> None:
        call = self._stub.Detokenize()
        batch: list[tuple[pb.DetokenizeChunk, asyncio.Future[Piece]]] = []
        error: ServiceError = LOST
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                batch = list(self._waiting.values())
                self._waiting.clear()
                if batch:
                    await self._exchange(call, batch)
        except grpc.aio.AioRpcError as failure:
            error = LOST if failure.code() is grpc.StatusCode.UNAVAILABLE else from_rpc_error(failure)
        except (asyncio.InvalidStateError, TimeoutError):
            error = LOST
        finally:
            call.cancel()
            self._fail([*batch, *self._waiting.values()], error)

    async def _exchange(
        self, call: Call, batch: list[tuple[pb.DetokenizeChunk, asyncio.Future[Piece]]]
    ) -> None:
        async with asyncio.timeout(EXCHANGE_SECONDS):
            await call.write(pb.DetokenizeRequest(chunks=[chunk for chunk, _ in batch]))
            response = await call.read()
        if not isinstance(response, pb.DetokenizeResponse):
            raise asyncio.InvalidStateError("the stream ended")
        for (_, future), piece in zip(batch, response.pieces, strict=True):
            if not future.done():
                future.set_result(piece)

    def _fail(
        self, unanswered: Sequence[tuple[pb.DetokenizeChunk, asyncio.Future[Piece]]], error: ServiceError
    ) -> None:
        self.generation += 1
        self._waiting.clear()
        for _, future in unanswered:
            if not future.done():
                future.set_exception(error)
                future.exception()  # looked at: nobody may be waiting for it


class DetokenizeSession:
    """One completion's text. Use as an async context manager: leaving it frees the tokenizer's state."""

    def __init__(self, stream: DetokenizeStream, session_id: int, options: pb.DetokenizeOptions) -> None:
        self._stream = stream
        self._session_id = session_id
        self._options: pb.DetokenizeOptions | None = options
        self._generation = stream.generation
        self._is_open = False

    async def push(self, token_ids: Sequence[int], *, end: bool = False) -> Piece:
        """The text that `token_ids` made printable; `end` flushes what was held back."""
        if self._generation != self._stream.generation:
            raise LOST
        chunk = pb.DetokenizeChunk(
            session_id=self._session_id, options=self._options, token_ids=token_ids, end=end
        )
        self._options, self._is_open = None, True
        piece = await self._stream.send(chunk)
        self._is_open = not piece.finished
        if piece.HasField("error_message"):
            raise InvalidArgumentError(piece.error_message)
        return piece

    def close(self) -> None:
        if self._is_open and self._generation == self._stream.generation:
            self._is_open = False
            self._stream.forget(self._session_id)

    def __enter__(self) -> DetokenizeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
