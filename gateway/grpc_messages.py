"""The gRPC text API's messages in the gateway's own words, and its events as messages."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.fields import MAX_STOPS
from gateway.requests import Event, Finished, Prompt, Started, TextPiece, TextRequest
from gateway.settings import GatewaySettings
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import SamplingParams
from protos.wint2.gateway.v1 import gateway_pb2 as pb

GenerateRequest = pb.GenerateRequest | pb.GenerateStreamRequest
ChatRequest = pb.ChatRequest | pb.ChatStreamRequest

MAX_BATCH = 1024


def generate(
    request: GenerateRequest, time_remaining: float | None, settings: GatewaySettings
) -> TextRequest:
    """`time_remaining` is the call's deadline, in seconds from now. Raises InvalidArgumentError."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgumentError("a prompt is required: text or token_ids", field="prompt")
    prompt: Prompt = request.text if kind == "text" else list(request.token_ids.ids)
    if not prompt:
        raise InvalidArgumentError("the prompt is empty", field=kind)
    return text_request("cmpl", request, prompt, time_remaining, settings)


def text_request(
    kind: str,
    request: GenerateRequest | ChatRequest,
    prompt: Prompt,
    time_remaining: float | None,
    settings: GatewaySettings,
) -> TextRequest:
    check_stop(request.stop)
    most = settings.request_timeout
    return TextRequest(
        request_id=f"{kind}-{uuid.uuid4().hex}",
        model=request.model,
        prompts=[prompt],
        deadline=time.monotonic() + min(most, most if time_remaining is None else time_remaining),
        sampling_params=one_completion(request.sampling_params),
        num_choices=num_choices(request.sampling_params, settings.max_choices),
        stop=list(request.stop),
        include_stop=request.include_stop,
        priority=request.priority,
        cache_salt=request.cache_salt if request.HasField("cache_salt") else None,
    )


def one_completion(params: SamplingParams) -> SamplingParams:
    """What each of the `n` is asked of a worker with."""
    result = SamplingParams()
    result.CopyFrom(params)
    result.ClearField("n")
    return result


def num_choices(params: SamplingParams, most: int) -> int:
    wanted = params.n if params.HasField("n") else 1
    if not 1 <= wanted <= most:
        raise InvalidArgumentError(f"must be between 1 and {most}, got {wanted}", field="sampling_params.n")
    return wanted


def check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOPS:
        raise InvalidArgumentError(f"has {len(stop)} strings; at most {MAX_STOPS} are taken", field="stop")
    if not all(stop):
        raise InvalidArgumentError("holds an empty string", field="stop")


def check_batch(items: Sequence[object], field: str) -> None:
    if not 1 <= len(items) <= MAX_BATCH:
        raise InvalidArgumentError(
            f"must have between 1 and {MAX_BATCH} entries, got {len(items)}", field=field
        )


def event_field(event: Event) -> dict[str, Any]:
    """The event under its name in the oneof of a stream's messages."""
    if isinstance(event, TextPiece):
        return {
            "delta": pb.TextDelta(
                index=event.index, text=event.text, token_ids=event.token_ids, logprobs=event.logprobs
            )
        }
    return {"start": start(event)} if isinstance(event, Started) else {"finish": finish(event)}


def completions(messages: Iterable[dict[str, Any]]) -> list[pb.Completion]:
    """What a stream would have been sent, put together by index."""
    folded: dict[int, pb.Completion] = {}
    for kind, message in (item for fields in messages for item in fields.items()):
        completion = folded.setdefault(message.index, pb.Completion())
        if kind == "delta":
            completion.text += message.text
            completion.reasoning += message.reasoning
            for name in ("token_ids", "logprobs", "tool_calls"):
                getattr(completion, name).extend(getattr(message, name))
        else:
            getattr(completion, kind).CopyFrom(message)
    return [folded[index] for index in sorted(folded)]


def start(event: Started) -> pb.CompletionStart:
    return pb.CompletionStart(
        index=event.index,
        prompt_tokens=event.num_prompt_tokens,
        cached_tokens=event.num_cached_tokens,
        prompt_logprobs=event.prompt_logprobs,
    )


def finish(event: Finished) -> pb.CompletionFinish:
    return pb.CompletionFinish(
        index=event.index,
        reason=event.reason,
        matched_stop=event.matched_stop,
        stop_token_id=event.stop_token_id,
        usage=event.usage,
        timings=event.timings,
    )
