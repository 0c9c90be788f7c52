"""The gRPC text API's messages in the gateway's own words, and its events as messages."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.struct_pb2 import Struct

from gateway.fields import MAX_STOPS
from gateway.requests import Event, Finished, Prompt, Started, TextPiece, TextRequest
from gateway.settings import GatewaySettings
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import SamplingParams
from protos.wint2.gateway.v1 import gateway_pb2 as pb
from protos.wint2.tokenizer.v1.tokenizer_pb2 import ApplyChatTemplateRequest

GenerateRequest = pb.GenerateRequest | pb.GenerateStreamRequest
ChatRequest = pb.ChatRequest | pb.ChatStreamRequest

ROLES = ("system", "user", "assistant")
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


def chat(request: ChatRequest, time_remaining: float | None, settings: GatewaySettings) -> TextRequest:
    """As `generate`."""
    if not request.messages:
        raise InvalidArgumentError("at least one message is required", field="messages")
    template = ApplyChatTemplateRequest(
        messages=[template_message(*numbered) for numbered in enumerate(request.messages)],
        template_kwargs=request.chat_template_kwargs,
    )
    return text_request("chatcmpl", request, template, time_remaining, settings)


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


def template_message(index: int, message: pb.ChatMessage) -> Struct:
    if message.role not in ROLES:
        raise InvalidArgumentError(
            f'is "{message.role:.50}"; it must be "system", "user" or "assistant"',
            field=f"messages.{index}.role",
        )
    result = Struct()
    result.update({"role": message.role, "content": message.content})
    return result


def event_field(event: Event) -> dict[str, Any]:
    """The event under its name in the oneof of a stream's messages."""
    if isinstance(event, TextPiece):
        return {
            "delta": pb.TextDelta(
                index=event.index, text=event.text, token_ids=event.token_ids, logprobs=event.logprobs
            )
        }
    return {"start": start(event)} if isinstance(event, Started) else {"finish": finish(event)}


def completions(events: Iterable[Event]) -> list[pb.Completion]:
    """A request's events put together, by index."""
    folded: dict[int, pb.Completion] = {}
    for event in events:
        completion = folded.setdefault(event.index, pb.Completion())
        if isinstance(event, TextPiece):
            completion.text += event.text
            completion.token_ids.extend(event.token_ids)
            completion.logprobs.extend(event.logprobs)
        elif isinstance(event, Started):
            completion.start.CopyFrom(start(event))
        else:
            completion.finish.CopyFrom(finish(event))
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
