"""An engine and a tokenizer that cost next to nothing, for measuring what lies between them and the clients.

python -m tests.bench.echo_engine engine LISTEN SCHEDULER STEP_SECONDS PHASES CLOCKS
python -m tests.bench.echo_engine tokenizer LISTEN
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import uvloop

from protos.rpc.channel import open_channel
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.wint2.tokenizer.v1 import tokenizer_pb2
from protos.wint2.worker.v1 import worker_pb2
from tests.fakes import EOS, FIRST_BYTE_ID, FakeTokenizer, FakeWorker, finish, serving, tokenizer_service
from tests.fakes import worker_service as echo_service

MODEL = "echo"
COMPLETION_TOKENS = 64
MAX_STREAMS = 4096
CLOCK = struct.Struct("d")
CLOCKS = struct.Struct(f"{COMPLETION_TOKENS}d")


class Clocks:
    """When the engine made each token of each stream: a file that engine and clients map."""

    def __init__(self, path: Path) -> None:
        size = MAX_STREAMS * (COMPLETION_TOKENS + 1) * CLOCK.size
        with path.open("ab") as file:
            file.truncate(size)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def __setitem__(self, place: tuple[int, int], seconds: float) -> None:
        CLOCK.pack_into(self._map, self._offset(*place), seconds)

    def row(self, stream: int) -> tuple[float, ...]:
        """The times of a stream's latest completion."""
        return CLOCKS.unpack_from(self._map, self._offset(stream, 0))

    def _offset(self, stream: int, token: int) -> int:
        return (stream % MAX_STREAMS * (COMPLETION_TOKENS + 1) + token) * CLOCK.size


def stream_ids(stream: int) -> list[int]:
    """The token ids that a prompt begins with, by which the engine knows whose it is."""
    return [stream % 256 + FIRST_BYTE_ID, stream // 256 + FIRST_BYTE_ID]


@dataclass
class Echo:
    """A call that runs: what was made of its completion, what of that was sent, and when."""

    request: worker_pb2.GenerateRequest
    num_made: int = 0
    num_sent: int = 0
    sent_at: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.num_sent == self.request.sampling_params.max_tokens

    @cached_property
    def stream(self) -> int:
        first, second = self.request.prompt.ids[:2]
        return first - FIRST_BYTE_ID + 256 * (second - FIRST_BYTE_ID)

    def step(self, now: float) -> list[worker_pb2.GenerateResponse]:
        """One more token; nothing to say of it before the interval that was asked for."""
        self.num_made += 1
        is_last = self.num_made == self.request.sampling_params.max_tokens
        if not is_last and self.num_sent and now - self.sent_at < self.request.min_delta_interval_ms / 1e3:
            return []
        messages = [] if self.num_sent else [prompt_info(self.request)]
        messages.append(delta(self.request, self.num_made - self.num_sent))
        self.num_sent, self.sent_at = self.num_made, now
        return [*messages, ending(self.request)] if is_last else messages


def prompt_info(request: worker_pb2.GenerateRequest) -> worker_pb2.GenerateResponse:
    info = worker_pb2.PromptInfo(prompt_tokens=len(request.prompt.ids))
    return worker_pb2.GenerateResponse(prompt_info=info)


def delta(request: worker_pb2.GenerateRequest, num_tokens: int) -> worker_pb2.GenerateResponse:
    return worker_pb2.GenerateResponse(delta=worker_pb2.Delta(token_ids=request.prompt.ids[-1:] * num_tokens))


def ending(request: worker_pb2.GenerateRequest) -> worker_pb2.GenerateResponse:
    completion = [FIRST_BYTE_ID] * request.sampling_params.max_tokens
    return worker_pb2.GenerateResponse(finish=finish(len(request.prompt.ids), completion))


class EchoEngine(FakeWorker):
    """Every `step_seconds` a token for each sequence. With `phases` the sequences' steps are spread over that
    time: with one all tokens come at once, as from one engine, with many each at its own time.
    """

    def __init__(self, step_seconds: float, phases: int, clocks: Clocks) -> None:
        super().__init__()
        self._tick_seconds = step_seconds / phases
        self._phases = phases
        self._clocks = clocks

    async def GenerateMany(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        calls: dict[int, Echo] = {}
        reader = asyncio.create_task(self._follow(requests, calls))
        due, tick = time.monotonic(), 0
        try:
            while True:
                due, tick = due + self._tick_seconds, tick + 1
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                phase = tick % self._phases
                due_calls = [one for one in calls.items() if one[0] % self._phases == phase]
                told = [step(call_id, call) for call_id, call in due_calls]
                message = worker_pb2.GenerateManyResponse(calls=[call for call in told if call.responses])
                self._stamp(call for _, call in due_calls)
                for call in told:
                    if call.HasField("end_status"):
                        del calls[call.call_id]
                if message.calls:
                    yield message
        finally:
            reader.cancel()

    async def _follow(self, requests: Any, calls: dict[int, Echo]) -> None:
        async for request in requests:
            for call in request.starts:
                calls[call.call_id] = Echo(call.request)
            for call_id in request.cancelled_call_ids:
                calls.pop(call_id, None)

    def _stamp(self, calls: Iterable[Echo]) -> None:
        """The step's tokens are there when its message is: what building it takes is not the gateway's."""
        now = time.monotonic()
        for call in calls:
            self._clocks[call.stream, call.num_made - 1] = now


def step(call_id: int, call: Echo) -> worker_pb2.GenerateCallResponse:
    responses = call.step(time.monotonic())
    end_status = b"" if call.is_over else None
    return worker_pb2.GenerateCallResponse(call_id=call_id, responses=responses, end_status=end_status)


class EchoTokenizer(FakeTokenizer):
    """A letter a token, whatever the token."""

    async def GetTokenTexts(self, request: Any, context: Any) -> tokenizer_pb2.GetTokenTextsResponse:
        return tokenizer_pb2.GetTokenTextsResponse(texts=["x"] * (FIRST_BYTE_ID + 256))

    async def Detokenize(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        counts: dict[int, int] = {}
        async for request in requests:
            pieces = [self._letters(counts, chunk) for chunk in request.chunks]
            yield tokenizer_pb2.DetokenizeResponse(pieces=pieces)

    @staticmethod
    def _letters(counts: dict[int, int], chunk: Any) -> tokenizer_pb2.DetokenizePiece:
        new = len(chunk.token_ids)
        count = counts[chunk.session_id] = counts.get(chunk.session_id, 0) + new
        if chunk.end:
            del counts[chunk.session_id]
        return tokenizer_pb2.DetokenizePiece(
            session_id=chunk.session_id, text="x" * new, num_tokens=count, finished=chunk.end, settled=True
        )


async def run_engine(listen: str, scheduler: str, step_seconds: float, phases: int, clocks: Path) -> None:
    registration = scheduler_pb2.WorkerRegistration(
        instance_id=listen, address=listen, model=MODEL, max_model_len=4096, max_num_seqs=MAX_STREAMS,
        eos_token_ids=[EOS],
    )  # fmt: skip

    async def events() -> AsyncIterator[scheduler_pb2.RegisterWorkerRequest]:
        yield scheduler_pb2.RegisterWorkerRequest(registration=registration)
        while True:
            yield scheduler_pb2.RegisterWorkerRequest(load=scheduler_pb2.WorkerLoad(is_serving=True))
            await asyncio.sleep(0.5)

    engine = EchoEngine(step_seconds, phases, Clocks(clocks))
    async with serving(echo_service(engine), listen=listen), open_channel(scheduler) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        async for _ in stub.RegisterWorker(events(), wait_for_ready=True):
            pass


async def run_tokenizer(listen: str) -> None:
    async with serving(tokenizer_service(EchoTokenizer()), listen=listen):
        await asyncio.Event().wait()


def main() -> None:
    match sys.argv[1:]:
        case ["engine", listen, scheduler, step, phases, clocks]:
            uvloop.run(run_engine(listen, scheduler, float(step), int(phases), Path(clocks)))
        case ["tokenizer", listen]:
            uvloop.run(run_tokenizer(listen))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
