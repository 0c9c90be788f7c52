"""TokenizerService: the wire's messages in and out of a Tokenizer, work that takes long on other threads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf import struct_pb2

from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1 import common_pb2
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from protos.wint2.tokenizer.v1 import tokenizer_pb2_grpc
from tokenizer_svc.errors import InputError
from tokenizer_svc.sessions import DetokenizeSessions
from tokenizer_svc.settings import RequestLimits
from tokenizer_svc.tokenizer import Tokenizer

# Below this a batch of ids becomes text faster than a thread takes over.
MAX_INLINE_TOKENS = 4096

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves one tokenizer. Encoding and rendering have `num_threads` and `num_renderers` threads."""

    def __init__(
        self, tokenizer: Tokenizer, limits: RequestLimits, *, num_threads: int, num_renderers: int
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._encoders = ThreadPoolExecutor(num_threads, "encode")
        self._renderers = ThreadPoolExecutor(num_renderers, "render")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        texts = list(request.texts)
        if len(texts) > self._limits.max_texts:
            raise InvalidArgumentError(
                f"{len(texts)} texts; the limit is {self._limits.max_texts}", field="texts"
            )
        self._check_size(request.ByteSize(), "texts")
        batch = await _run(
            self._encoders,
            lambda: self._tokenizer.encode_batch(
                texts,
                add_special_tokens=not request.HasField("add_special_tokens") or request.add_special_tokens,
                parse_special_tokens=request.parse_special_tokens,
            ),
        )
        return pb.TokenizeResponse(token_ids=[common_pb2.TokenIds(ids=ids) for ids in batch])

    async def Detokenize(
        self, request_iterator: AsyncIterator[pb.DetokenizeRequest], context: Context
    ) -> AsyncIterator[pb.DetokenizeResponse]:
        sessions = DetokenizeSessions(self._tokenizer, self._limits)
        async for request in request_iterator:
            if sum(len(chunk.token_ids) for chunk in request.chunks) <= MAX_INLINE_TOKENS:
                yield sessions.push_all(request.chunks)
            else:
                yield await _run(self._encoders, partial(sessions.push_all, request.chunks))

    async def ApplyChatTemplate(
        self, request: pb.ApplyChatTemplateRequest, context: Context
    ) -> pb.ApplyChatTemplateResponse:
        self._check_size(request.ByteSize(), "messages")
        messages = [to_python(message) for message in request.messages]
        _check_messages(messages)
        tools = [_parse_tool(text, index) for index, text in enumerate(request.tools_json)]
        text, token_ids = await _run(
            self._renderers,
            lambda: self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=(
                    not request.HasField("add_generation_prompt") or request.add_generation_prompt
                ),
                tools=tools or None,
                template_kwargs=to_python(request.template_kwargs),
                chat_template=request.chat_template if request.HasField("chat_template") else None,
            ),
        )
        return pb.ApplyChatTemplateResponse(text=text, token_ids=common_pb2.TokenIds(ids=token_ids))

    async def GetTokenizerInfo(
        self, request: pb.GetTokenizerInfoRequest, context: Context
    ) -> pb.GetTokenizerInfoResponse:
        info = self._tokenizer.info
        return pb.GetTokenizerInfoResponse(
            kind=info.kind,
            vocab_size=info.vocab_size,
            bos_token_id=info.bos_token_id,
            eos_token_ids=info.eos_token_ids,
            pad_token_id=info.pad_token_id,
            chat_template=info.chat_template,
            model_path=info.model_path,
        )

    async def GetTokenTexts(
        self, request: pb.GetTokenTextsRequest, context: Context
    ) -> pb.GetTokenTextsResponse:
        texts = await _run(self._encoders, self._tokenizer.vocabulary.fixed_texts)
        return pb.GetTokenTextsResponse(texts=texts)

    def _check_size(self, num_bytes: int, field: str) -> None:
        limit = self._limits.max_text_bytes
        if num_bytes > limit:
            raise InvalidArgumentError(f"{num_bytes} bytes of {field}; the limit is {limit}", field=field)


async def _run(threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    with _for_the_caller():
        return await asyncio.get_running_loop().run_in_executor(threads, work)


@contextmanager
def _for_the_caller() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InvalidArgumentError(error.message, field=error.field) from error


def _check_messages(messages: Sequence[dict[str, Any]]) -> None:
    if not messages:
        raise InvalidArgumentError("a conversation has at least one message", field="messages")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InvalidArgumentError(
                f'message {index} has no "role" that is a string', field=f"messages[{index}].role"
            )


def _parse_tool(text: str, index: int) -> dict[str, Any]:
    field = f"tools_json[{index}]"
    try:
        tool = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"tool {index} is not valid JSON: {error}", field=field) from error
    if not isinstance(tool, dict):
        raise InvalidArgumentError(f"tool {index} is no JSON object", field=field)
    return tool


def to_python(value: struct_pb2.Struct | struct_pb2.Value | struct_pb2.ListValue) -> Any:
    """The JSON value. Struct has no order: keys come sorted. It has only doubles: whole ones become ints."""
    if isinstance(value, struct_pb2.Struct):
        return {key: to_python(value.fields[key]) for key in sorted(value.fields)}
    if isinstance(value, struct_pb2.ListValue):
        return [to_python(item) for item in value.values]
    match value.WhichOneof("kind"):
        case "struct_value":
            return to_python(value.struct_value)
        case "list_value":
            return to_python(value.list_value)
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
    return None
