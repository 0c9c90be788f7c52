"""The services that the gateway calls; no other module of it touches a stub."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import grpc

from gateway.deadline import within
from gateway.detokenize import DetokenizeSession, DetokenizeStream, PieceSink
from gateway.scheduler.dispatcher import Dispatcher
from gateway.worker_stream import ResponseSink, WorkerStream
from protos.rpc.channel import open_channel
from protos.rpc.errors import InternalError, ServiceError, UnavailableError, from_rpc_error
from protos.rpc.security import PLAINTEXT, Security
from protos.rpc.telemetry import outgoing_metadata
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.wint2.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

UNSAID = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@contextlib.contextmanager
def errors_of(peer: str) -> Iterator[None]:
    """Turns the call's failure into a ServiceError that names the peer, not its sockets."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise explain(error, peer) from error


def explain(error: grpc.aio.AioRpcError, peer: str) -> ServiceError:
    service_error = from_rpc_error(error)
    is_own_words = bool(service_error.metadata) or service_error.reason != service_error.default_reason
    if error.code() is grpc.StatusCode.UNAVAILABLE and not is_own_words:
        message = f"the connection to the {peer} failed"
        return UnavailableError(message, reason="CONNECTION_LOST", retry_after_seconds=1)
    if error.code() in UNSAID:
        return InternalError(f"internal error in the {peer}")
    return service_error


class TokenizerClient:
    """Text to ids and back."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._detokenize = DetokenizeStream(self._stub)
        self._token_texts: dict[int, str] = {}
        self._joint: list[int] | None = None
        self._chat_template: str | None = None

    async def encode(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool,
        timeout: float,
        parse_special_tokens: bool = False,
    ) -> list[list[int]]:
        """One list of ids a text; special tokens that a client's text spells out stay text."""
        request = tokenizer_pb2.TokenizeRequest(
            texts=texts, add_special_tokens=add_special_tokens, parse_special_tokens=parse_special_tokens
        )
        with errors_of("tokenizer"):
            response = await self._stub.Tokenize(request, timeout=timeout, metadata=outgoing_metadata())
        return [list(token_ids.ids) for token_ids in response.token_ids]

    async def apply_chat_template(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, timeout: float
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        with errors_of("tokenizer"):
            return await self._stub.ApplyChatTemplate(request, timeout=timeout, metadata=outgoing_metadata())

    async def chat_template(self) -> str:
        """The model's template, "" if it has none. Learned once, until `forget`."""
        if self._chat_template is None:
            with errors_of("tokenizer"):
                info = await self._stub.GetTokenizerInfo(
                    tokenizer_pb2.GetTokenizerInfoRequest(), timeout=10, metadata=outgoing_metadata()
                )
            self._chat_template = info.chat_template
        return self._chat_template

    def prepare(self) -> None:
        """Opens the stream of tokens before somebody waits for it."""
        self._detokenize.open()

    def forget(self) -> None:
        """The tokenizer went away; the one that comes may know other things."""
        self._chat_template, self._joint, self._token_texts = None, None, {}

    def session(self, options: tokenizer_pb2.DetokenizeOptions, sink: PieceSink) -> DetokenizeSession:
        """One completion's way from ids to text."""
        return self._detokenize.session(options, sink)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        options = tokenizer_pb2.DetokenizeOptions(skip_special_tokens=skip_special_tokens)
        return await self._detokenize.decode(token_ids, options)

    async def token_texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """Each token's text as it reads inside a line, special tokens spelled out. Learned once an id."""
        known = self._token_texts
        missing = [token_id for token_id in set(token_ids) if token_id not in known]
        if missing:
            texts = await asyncio.gather(*map(self._decode_inside, missing))
            known.update(zip(missing, texts, strict=True))
        return known

    async def _decode_inside(self, token_id: int) -> str:
        if self._joint is None:
            # Some vocabularies drop the space that begins a text, so a token is read behind another one.
            [self._joint] = await self.encode(["a"], add_special_tokens=False, timeout=10)
        options = tokenizer_pb2.DetokenizeOptions(skip_special_tokens=False, prefix_token_ids=self._joint)
        return await self._detokenize.decode([token_id], options)

    async def close(self) -> None:
        await self._detokenize.close()
        await self.channel.close()


@dataclass(frozen=True, slots=True)
class _Link:
    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.WorkerServiceAsyncStub
    stream: WorkerStream

    async def close(self) -> None:
        await self.stream.close()
        await self.channel.close()


class WorkerClient:
    """Generate calls to any number of workers; a connection each, kept while it is of use."""

    def __init__(self, security: Security = PLAINTEXT) -> None:
        self._security = security
        self._links: dict[str, _Link] = {}

    @contextlib.contextmanager
    def generate(
        self,
        address: str,
        request: worker_pb2.GenerateRequest,
        sink: ResponseSink,
        *,
        timeout: float,
        lost: asyncio.Future[ServiceError],
    ) -> Iterator[None]:
        """The worker's messages go to the sink. Leaving cancels the call; `lost` ends it with its error."""
        call = self._link(address).stream.start(request, timeout, sink)

        def give_up(_: asyncio.Future[ServiceError]) -> None:
            call.fail(lost.result())

        lost.add_done_callback(give_up)
        try:
            yield
        finally:
            lost.remove_done_callback(give_up)
            call.close()

    async def expert_tokens(self, address: str) -> Sequence[worker_pb2.LayerExpertTokens]:
        """Each layer's counts, none if the worker does not count. Raises ServiceError."""
        request = worker_pb2.GetExpertTokensRequest()
        with errors_of("worker"):
            answer = await self._link(address).stub.GetExpertTokens(
                request, timeout=1.0, metadata=outgoing_metadata()
            )
        return answer.layers

    async def retain(self, addresses: set[str]) -> None:
        """Closes idle connections to workers that are no longer listed."""
        for address, link in list(self._links.items()):
            if address not in addresses and link.stream.num_calls == 0:
                await self._links.pop(address).close()

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()

    def _link(self, address: str) -> _Link:
        link = self._links.get(address)
        if link is None:
            channel = open_channel(address, self._security)
            stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
            stream = WorkerStream(stub, partial(explain, peer="worker"))
            link = self._links[address] = _Link(channel, stub, stream)
        return link


@dataclass(frozen=True, slots=True)
class Placement:
    """A place on a worker; `lost` ends with an error when the worker has to be given up."""

    placed: scheduler_pb2.Placed
    lost: asyncio.Future[ServiceError]


class SchedulerClient(Protocol):
    """The scheduler, wherever it runs."""

    def place(
        self, request: scheduler_pb2.ScheduleRequest, timeout: float
    ) -> AbstractAsyncContextManager[Placement]:
        """Waits for a place and holds it while the context is open."""

    async def list_workers(self) -> list[scheduler_pb2.Worker]:
        """Every worker known and its load; raises UnavailableError if the scheduler cannot be reached."""

    async def queue(self) -> scheduler_pb2.GetQueueResponse:
        """What waits."""


class LocalScheduler:
    """The scheduler that this process hosts."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @contextlib.asynccontextmanager
    async def place(self, request: scheduler_pb2.ScheduleRequest, timeout: float) -> AsyncIterator[Placement]:
        place = self._dispatcher.submit(request)
        try:
            placed = await within(timeout, place.wait_placed())
            yield Placement(placed, place.lost)
        finally:
            self._dispatcher.withdraw(place)

    async def list_workers(self) -> list[scheduler_pb2.Worker]:
        return self._dispatcher.list_workers()

    async def queue(self) -> scheduler_pb2.GetQueueResponse:
        return self._dispatcher.queue()


class RemoteScheduler:
    """A scheduler process that several gateways share."""

    TIMEOUT_SECONDS = 1.0

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: scheduler_pb2_grpc.SchedulerServiceAsyncStub
        self._stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)

    @contextlib.asynccontextmanager
    async def place(self, request: scheduler_pb2.ScheduleRequest, timeout: float) -> AsyncIterator[Placement]:
        call = self._stub.Schedule(request, timeout=timeout, metadata=outgoing_metadata())
        watch: asyncio.Task[None] | None = None
        try:
            placed = await self._wait_placed(call)
            lost: asyncio.Future[ServiceError] = asyncio.get_running_loop().create_future()
            watch = asyncio.create_task(self._watch(call, lost))
            yield Placement(placed, lost)
        finally:
            call.cancel()
            if watch is not None:
                watch.cancel()

    async def list_workers(self) -> list[scheduler_pb2.Worker]:
        with errors_of("scheduler"):
            response = await self._stub.ListWorkers(
                scheduler_pb2.ListWorkersRequest(), timeout=self.TIMEOUT_SECONDS
            )
        return list(response.workers)

    async def queue(self) -> scheduler_pb2.GetQueueResponse:
        with errors_of("scheduler"):
            return await self._stub.GetQueue(scheduler_pb2.GetQueueRequest(), timeout=self.TIMEOUT_SECONDS)

    async def _wait_placed(
        self, call: grpc.aio.UnaryStreamCall[scheduler_pb2.ScheduleRequest, scheduler_pb2.ScheduleResponse]
    ) -> scheduler_pb2.Placed:
        with errors_of("scheduler"):
            async for response in call:
                if response.WhichOneof("event") == "placed":
                    return response.placed
        raise UnavailableError("the scheduler gave no place", reason="CONNECTION_LOST", retry_after_seconds=1)

    async def _watch(
        self,
        call: grpc.aio.UnaryStreamCall[scheduler_pb2.ScheduleRequest, scheduler_pb2.ScheduleResponse],
        lost: asyncio.Future[ServiceError],
    ) -> None:
        """Only the scheduler's word gives up a worker; that the scheduler itself went away does not."""
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            service_error = from_rpc_error(error)
            if service_error.reason == "WORKER_LOST" and not lost.done():
                lost.set_result(service_error)
