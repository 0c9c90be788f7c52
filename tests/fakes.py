"""Stand-ins for the services: they implement the generated servicers and are reached over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from protos.rpc.channel import open_channel
from protos.rpc.errors import InvalidArgumentError
from protos.rpc.many import generate_many
from protos.rpc.server import GrpcServer, Service
from protos.wint2.common.v1 import common_pb2
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.wint2.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

EOS = 2
FIRST_BYTE_ID = 3  # FakeTokenizer's id of byte 0; ids below are special
WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
SCHEDULER = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"]
TOKENIZER = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"]


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One id a UTF-8 byte; its chat template writes tools and "role: content" lines, then `opening`."""

    def __init__(self) -> None:
        self.chat_template = "{{ messages }}"
        self.opening = ""
        self.knows_tools = True
        self.conversations: list[tokenizer_pb2.ApplyChatTemplateRequest] = []

    async def Tokenize(self, request: Any, context: Any) -> tokenizer_pb2.TokenizeResponse:
        return tokenizer_pb2.TokenizeResponse(token_ids=[encode(text) for text in request.texts])

    async def ApplyChatTemplate(self, request: Any, context: Any) -> tokenizer_pb2.ApplyChatTemplateResponse:
        if not request.messages:
            raise InvalidArgumentError("messages must not be empty", field="messages")
        self.conversations.append(request)
        tools = "".join(f"{tool}\n" for tool in request.tools_json if self.knows_tools)
        lines = "".join(f"{message['role']}: {message['content']}\n" for message in request.messages)
        text = tools + lines + self.opening
        return tokenizer_pb2.ApplyChatTemplateResponse(text=text, token_ids=encode(text))

    async def GetTokenizerInfo(self, request: Any, context: Any) -> tokenizer_pb2.GetTokenizerInfoResponse:
        return tokenizer_pb2.GetTokenizerInfoResponse(
            kind="fake",
            vocab_size=FIRST_BYTE_ID + 256,
            eos_token_ids=[EOS],
            chat_template=self.chat_template,
        )

    async def GetTokenTexts(self, request: Any, context: Any) -> tokenizer_pb2.GetTokenTextsResponse:
        return tokenizer_pb2.GetTokenTextsResponse(texts=[""] * FIRST_BYTE_ID + [chr(i) for i in range(128)])

    async def Detokenize(
        self, requests: Any, context: Any
    ) -> AsyncIterator[tokenizer_pb2.DetokenizeResponse]:
        sessions: dict[int, FakeSession] = {}
        async for request in requests:
            pieces = [self._piece(sessions, chunk) for chunk in request.chunks]
            yield tokenizer_pb2.DetokenizeResponse(pieces=pieces)

    @staticmethod
    def _piece(sessions: dict[int, FakeSession], chunk: Any) -> tokenizer_pb2.DetokenizePiece:
        session = sessions.setdefault(chunk.session_id, FakeSession(chunk.options))
        piece = session.push(chunk)
        if piece.finished:
            del sessions[chunk.session_id]
        return piece


class FakeSession:
    """Bytes to whole characters, up to the first stop string; what may begin a stop string is held back."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.ids: list[int] = []
        self.sent = ""

    def push(self, chunk: Any) -> tokenizer_pb2.DetokenizePiece:
        self.ids += chunk.token_ids
        text = bytes(i - FIRST_BYTE_ID for i in self.ids if i >= FIRST_BYTE_ID).decode("utf-8", "ignore")
        matched = next((stop for stop in self.options.stop if stop in text), None)
        if matched is not None:
            end = text.index(matched) + len(matched)
            printed, stands_for = text[: end if self.options.include_stop else end - len(matched)], text[:end]
        else:
            printed = stands_for = text if chunk.end else text[: len(text) - self._held_back(text)]
        new, self.sent = printed[len(self.sent) :], printed
        ends_here = chunk.end and matched is None
        num_tokens = len(self.ids) if ends_here else self._num_tokens(len(stands_for.encode()))
        finished = chunk.end or matched is not None
        return tokenizer_pb2.DetokenizePiece(
            session_id=chunk.session_id,
            text=new,
            matched_stop=matched,
            num_tokens=num_tokens,
            finished=finished,
            settled=not finished and num_tokens == len(self.ids),
        )

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        ends = (n for stop in self.options.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(ends, default=0)

    def _num_tokens(self, num_bytes: int) -> int:
        """Tokens that `num_bytes` of text stand for; special ones go with the text before them."""
        count = 0
        for token_id in self.ids:
            num_bytes -= token_id >= FIRST_BYTE_ID
            if num_bytes < 0:
                break
            count += 1
        return count


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Streams `completion` (default: the prompt again), one token a message, `delay_seconds` between them.

    `live` holds the ids of requests whose streams are open; `error` is raised after `error_after` tokens.
    While `may_finish` is cleared, completions wait before their last message.
    """

    def __init__(self, *, completion: list[int] | None = None, delay_seconds: float = 0.0) -> None:
        self.completion = completion
        self.delay_seconds = delay_seconds
        self.max_model_len = 4096
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.error: Exception | None = None
        self.error_after = 0
        self.live: set[str] = set()
        self.requests: list[worker_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.live.add(request.request_id)
        try:
            async for response in self._stream(request):
                yield response
        finally:
            self.live.discard(request.request_id)

    def GenerateMany(self, requests: Any, context: Any) -> AsyncIterator[worker_pb2.GenerateManyResponse]:
        return generate_many(self.Generate, requests)

    async def _stream(self, request: Any) -> AsyncIterator[worker_pb2.GenerateResponse]:
        prompt, params = request.prompt.ids, request.sampling_params
        info = worker_pb2.PromptInfo(prompt_tokens=len(prompt), effective_params=params)
        if params.HasField("prompt_logprobs"):
            info.prompt_logprobs.extend(logprobs(token_id, params.prompt_logprobs) for token_id in prompt[1:])
        yield worker_pb2.GenerateResponse(prompt_info=info)
        ids = [*(self.completion if self.completion is not None else prompt), EOS]
        ids = ids[: params.max_tokens] if params.HasField("max_tokens") else ids
        for index, token_id in enumerate(ids):
            self._fail_after(index)
            await asyncio.sleep(self.delay_seconds)
            yield worker_pb2.GenerateResponse(delta=delta(token_id, params))
        self._fail_after(len(ids))
        await self.may_finish.wait()
        yield worker_pb2.GenerateResponse(finish=finish(len(prompt), ids))

    def _fail_after(self, num_tokens: int) -> None:
        if self.error is not None and num_tokens >= self.error_after:
            raise self.error

    async def GetModelInfo(self, request: Any, context: Any) -> worker_pb2.GetModelInfoResponse:
        return worker_pb2.GetModelInfoResponse(
            served_model_name="fake", max_model_len=self.max_model_len, eos_token_ids=[EOS], vocab_size=259
        )

    async def GetServerInfo(self, request: Any, context: Any) -> worker_pb2.GetServerInfoResponse:
        return worker_pb2.GetServerInfoResponse(
            instance_id="fake", max_num_seqs=8, block_size=64, device="a fake device"
        )

    async def GetLoad(self, request: Any, context: Any) -> worker_pb2.GetLoadResponse:
        return worker_pb2.GetLoadResponse(num_running=len(self.live), num_kv_blocks=64)

    async def GetExpertTokens(self, request: Any, context: Any) -> worker_pb2.GetExpertTokensResponse:
        layers = [worker_pb2.LayerExpertTokens(layer=layer, tokens=[3, 0, layer]) for layer in (1, 2)]
        return worker_pb2.GetExpertTokensResponse(layers=layers)


class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Takes every worker in and remembers what it said; places nothing."""

    def __init__(self) -> None:
        self.registrations: list[scheduler_pb2.WorkerRegistration] = []
        self.loads: list[scheduler_pb2.WorkerLoad] = []
        self.num_connected = 0

    async def RegisterWorker(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.num_connected += 1
        try:
            async for request in requests:
                if request.HasField("registration"):
                    self.registrations.append(request.registration)
                    yield scheduler_pb2.RegisterWorkerResponse(worker_id=f"worker-{len(self.registrations)}")
                else:
                    self.loads.append(request.load)
        finally:
            self.num_connected -= 1


def encode(text: str) -> common_pb2.TokenIds:
    return common_pb2.TokenIds(ids=[byte + FIRST_BYTE_ID for byte in text.encode()])


def delta(token_id: int, params: common_pb2.SamplingParams) -> worker_pb2.Delta:
    told = [logprobs(token_id, params.logprobs)] if params.HasField("logprobs") else []
    return worker_pb2.Delta(token_ids=[token_id], logprobs=told)


def logprobs(token_id: int, num_top: int) -> common_pb2.PositionLogprobs:
    sampled = common_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)
    return common_pb2.PositionLogprobs(sampled=sampled, top=[sampled] * num_top)


def finish(num_prompt_tokens: int, ids: list[int]) -> worker_pb2.Finish:
    usage = common_pb2.Usage(prompt_tokens=num_prompt_tokens, completion_tokens=len(ids))
    if ids[-1:] == [EOS]:
        return worker_pb2.Finish(reason=common_pb2.FINISH_REASON_STOP, stop_token_id=EOS, usage=usage)
    return worker_pb2.Finish(reason=common_pb2.FINISH_REASON_LENGTH, usage=usage)


def worker_service(servicer: worker_pb2_grpc.WorkerServiceServicer) -> Service:
    return Service(
        WORKER,
        worker_pb2_grpc.add_WorkerServiceServicer_to_server,
        servicer,
        frozenset({"GenerateMany"}),
    )


def tokenizer_service(servicer: tokenizer_pb2_grpc.TokenizerServiceServicer) -> Service:
    return Service(
        TOKENIZER,
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server,
        servicer,
        frozenset({"Detokenize"}),
    )


def scheduler_service(servicer: scheduler_pb2_grpc.SchedulerServiceServicer) -> Service:
    return Service(
        SCHEDULER,
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
        servicer,
        frozenset({"RegisterWorker"}),
    )


@asynccontextmanager
async def serving(*services: Service, listen: str = "127.0.0.1:0", **options: Any) -> AsyncIterator[str]:
    """A SERVING server with these services; its address. `options` are GrpcServer's."""
    server = GrpcServer(listen, [service.descriptor for service in services], **options)
    address = await server.start()
    for service in services:
        server.add(service)
    await server.set_serving(True)
    try:
        yield address
    finally:
        await server.stop()


@asynccontextmanager
async def connected(*services: Service) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a SERVING server with these services."""
    async with serving(*services) as address, open_channel(address) as channel:
        yield channel
