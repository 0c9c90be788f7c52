"""A choice as it grows: what gathers unread is put together, what came before a failure is still told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest

from gateway.clients import TokenizerClient
from gateway.completion import Completion
from gateway.requests import Event, Finished, TextPiece
from protos.rpc.errors import ServiceError, UnavailableError
from protos.wint2.common.v1.common_pb2 import FINISH_REASON_STOP, Usage
from protos.wint2.tokenizer.v1.tokenizer_pb2 import DetokenizeOptions
from protos.wint2.worker.v1.worker_pb2 import Delta, Finish, GenerateResponse
from tests.fakes import FIRST_BYTE_ID, FakeTokenizer, connected, tokenizer_service
from tests.gateway.harness import until

END = GenerateResponse(finish=Finish(reason=FINISH_REASON_STOP, usage=Usage(completion_tokens=5)))


def letters(text: str) -> GenerateResponse:
    return GenerateResponse(delta=Delta(token_ids=[byte + FIRST_BYTE_ID for byte in text.encode()]))


@asynccontextmanager
async def completing(*stop: str) -> AsyncIterator[Completion]:
    async with connected(tokenizer_service(FakeTokenizer())) as channel, asyncio.timeout(30):
        client = TokenizerClient(channel)
        options = DetokenizeOptions(stop=stop)
        made = Completion(0, frozenset(), lambda sink: client.session(options, sink), include_stop=False)
        with closing(made):
            yield made
        await client.close()


async def read_all(completion: Completion, told: list[Event] | None = None) -> list[Event]:
    """All events; in `told` those before a failure too."""
    told = [] if told is None else told
    async for event in completion.events():
        told.append(event)
    return told


async def test_pieces_that_nobody_reads_are_put_together() -> None:
    async with completing() as completion:
        for letter in "hello":
            completion.on_response(letters(letter))
            await asyncio.sleep(0.01)
        completion.on_response(END)
        await until(lambda: completion._is_finished)
        *pieces, finished = await read_all(completion)
    assert isinstance(finished, Finished)
    assert [piece.text for piece in pieces if isinstance(piece, TextPiece)] == ["hello"]
    assert [token_id - FIRST_BYTE_ID for piece in pieces for token_id in piece.token_ids] == list(b"hello")


async def test_what_came_before_a_failure_is_told_before_it() -> None:
    told: list[Event] = []
    async with completing() as completion:
        completion.on_response(letters("hel"))
        completion.on_end(UnavailableError("gone"))
        with pytest.raises(ServiceError, match="gone"):
            await read_all(completion, told)
    assert "".join(event.text for event in told) == "hel"


async def test_a_worker_that_ends_without_a_finish_is_lost() -> None:
    async with completing() as completion:
        completion.on_response(letters("x"))
        completion.on_end(None)
        with pytest.raises(UnavailableError) as caught:
            await read_all(completion)
    assert caught.value.reason == "WORKER_LOST"


async def test_tokens_on_their_way_behind_a_stop_string_are_passed_over() -> None:
    async with completing("lo") as completion:
        for letter in "hello there":
            completion.on_response(letters(letter))
            await asyncio.sleep(0)
        *pieces, finished = await read_all(completion)
        completion.on_response(letters("more"))
        completion.on_end(None)
    assert "".join(piece.text for piece in pieces) == "hel"
    assert finished.matched_stop == "lo"
    assert finished.usage.completion_tokens == 5
