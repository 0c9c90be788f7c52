"""Wire messages to the engine's types and back, and the engine's refusals to the errors of the wire."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from gpu_worker.engine.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineDrainingError,
    RequestError,
)
from gpu_worker.engine.sequence import PositionLogprobs, Request, StepOutput, TokenLogprob
from gpu_worker.sampling_params import SamplingParams, SamplingParamsError, StructuredOutput
from protos.rpc import errors
from protos.wint2.common.v1 import common_pb2
from protos.wint2.worker.v1 import worker_pb2

EngineError = RequestError | EngineDeadError | EngineDrainingError

MAX_REQUEST_ID_CHARS = 256
PARAM_NAMES = frozenset(field.name for field in fields(SamplingParams))
WIRE_PARAM_NAMES = tuple(
    field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields if field.name in PARAM_NAMES
)
FINISH_REASONS: Mapping[str | None, common_pb2.FinishReason.ValueType] = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
    "aborted": common_pb2.FINISH_REASON_ABORTED,
}


def read_request(message: worker_pb2.GenerateRequest, time_remaining: float | None) -> Request:
    """`time_remaining` is the call's deadline, in seconds from now. Raises InvalidArgumentError."""
    now = time.monotonic()
    return Request(
        request_id=_request_id(message.request_id),
        prompt_token_ids=tuple(message.prompt.ids),
        params=read_params(message.sampling_params),
        priority=message.priority,
        cache_salt=message.cache_salt,
        arrival_time=now,
        deadline=None if time_remaining is None else now + time_remaining,
    )


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID_CHARS:
        raise errors.InvalidArgumentError(
            f"request_id must be at most {MAX_REQUEST_ID_CHARS} characters, got {len(given)}",
            field="request_id",
        )
    return given or uuid.uuid4().hex


def read_params(message: common_pb2.SamplingParams) -> SamplingParams:
    """The given fields over the defaults. Raises InvalidArgumentError naming the field and its limits."""
    given = {field.name: value for field, value in message.ListFields()}
    try:
        read = {name: READERS[name](value) if name in READERS else value for name, value in given.items()}
        return SamplingParams(**{"max_tokens": None, **read})
    except SamplingParamsError as error:
        raise errors.InvalidArgumentError(
            f"sampling_params.{error}", field=f"sampling_params.{error.field}"
        ) from error


def _read_structured_output(message: common_pb2.StructuredOutput) -> StructuredOutput:
    kind = message.WhichOneof("format")
    if kind is None:
        return StructuredOutput()
    value = getattr(message, kind)
    return StructuredOutput(**{kind: _FORMAT_READERS[kind](value) if kind in _FORMAT_READERS else value})


_FORMAT_READERS: Mapping[str, Callable[[Any], Any]] = {
    "json_object": lambda message: True,
    "choice": lambda message: message.texts,
}

# What is not a number on the wire, as the engine's types have it.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "bad_words_token_ids": lambda runs: [run.ids for run in runs],
    "structured_output": _read_structured_output,
}


def effective_params(request: Request, max_model_len: int) -> common_pb2.SamplingParams:
    """The parameters in force, defaults filled in."""
    room = max_model_len - len(request.prompt_token_ids)
    return write_params(replace(request.params, max_tokens=min(request.params.max_tokens or room, room)))


def write_params(params: SamplingParams) -> common_pb2.SamplingParams:
    given = {name: getattr(params, name) for name in WIRE_PARAM_NAMES}
    written = {name: WRITERS[name](value) if name in WRITERS else value for name, value in given.items()}
    return common_pb2.SamplingParams(**{name: value for name, value in written.items() if value is not None})


def _write_structured_output(given: StructuredOutput | None) -> common_pb2.StructuredOutput | None:
    if given is None:
        return None
    texts: dict[str, Any] = {"json_schema": given.json_schema, "regex": given.regex, "grammar": given.grammar}
    return common_pb2.StructuredOutput(
        json_object=common_pb2.AnyJsonObject() if given.json_object else None,
        choice=common_pb2.Choices(texts=given.choice) if given.choice else None,
        **texts,
    )


WRITERS: Mapping[str, Callable[[Any], Any]] = {
    "bad_words_token_ids": lambda runs: [common_pb2.TokenIds(ids=run) for run in runs],
    "structured_output": _write_structured_output,
}


def prompt_info(output: StepOutput, params: common_pb2.SamplingParams) -> worker_pb2.GenerateResponse:
    scored = [_position(position) for position in output.prompt_logprobs or ()]
    info = worker_pb2.PromptInfo(
        prompt_tokens=output.num_prompt_tokens,
        cached_tokens=output.num_cached_tokens,
        effective_params=params,
        prompt_logprobs=scored,
    )
    return worker_pb2.GenerateResponse(prompt_info=info)


def responses(output: StepOutput) -> Iterator[worker_pb2.GenerateResponse]:
    """The delta of an output if it has tokens, then the finish if it is the last."""
    if output.token_ids:
        logprobs = [_position(position) for position in output.logprobs or ()]
        delta = worker_pb2.Delta(token_ids=output.token_ids, logprobs=logprobs, index=output.index)
        yield worker_pb2.GenerateResponse(delta=delta)
    if output.finish_reason is not None:
        yield worker_pb2.GenerateResponse(finish=_finish(output))


def _finish(output: StepOutput) -> worker_pb2.Finish:
    timings = None
    if (spent := output.timings) is not None:
        timings = common_pb2.Timings(
            queue_ms=spent.queue_seconds * 1e3,
            prefill_ms=spent.prefill_seconds * 1e3,
            decode_ms=spent.decode_seconds * 1e3,
        )
    usage = common_pb2.Usage(
        prompt_tokens=output.num_prompt_tokens,
        completion_tokens=output.num_completion_tokens,
        cached_tokens=output.num_cached_tokens,
    )
    return worker_pb2.Finish(
        reason=FINISH_REASONS[output.finish_reason],
        stop_token_id=output.stop_token_id,
        usage=usage,
        timings=timings,
        index=output.index,
    )


def _position(position: PositionLogprobs) -> common_pb2.PositionLogprobs:
    return common_pb2.PositionLogprobs(
        sampled=_logprob(position.sampled), top=[_logprob(token) for token in position.top]
    )


def _logprob(token: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob)


def service_error(error: EngineError, request: Request, max_model_len: int) -> errors.ServiceError:
    """What a refusal of the engine is on the wire."""
    if isinstance(error, EngineDrainingError):
        return errors.UnavailableError(str(error), reason="DRAINING", retry_after_seconds=1.0)
    if isinstance(error, EngineDeadError):
        return errors.UnavailableError(str(error), reason="ENGINE_DEAD")
    path = f"sampling_params.{error.field}" if error.field in PARAM_NAMES else error.field
    message = f"{path}{str(error).removeprefix(error.field)}"
    if isinstance(error, ContextLengthError):
        numbers = {
            "prompt_tokens": len(request.prompt_token_ids),
            "max_tokens": request.params.max_tokens,
            "max_model_len": max_model_len,
        }
        metadata = {name: str(number) for name, number in numbers.items() if number is not None}
        return errors.ContextLengthError(message, field=path, metadata=metadata)
    return errors.InvalidArgumentError(message, field=path)
