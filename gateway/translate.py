"""OpenAI's requests in the gateway's own words."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from google.protobuf.struct_pb2 import Struct

from gateway.chat_schemas import ChatCompletionRequest, Message, TemplateOptions, Tool, ToolCall
from gateway.requests import Limits, Prompt, TextRequest
from gateway.schemas import CommonRequest, CompletionRequest
from gateway.structured import structured_output
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import SamplingParams
from protos.wint2.tokenizer.v1.tokenizer_pb2 import ApplyChatTemplateRequest

# Fields that mean the same in both worlds, under the same name.
SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
)


def check_template(options: TemplateOptions, limits: Limits) -> None:
    if options.chat_template is not None and not limits.trust_request_chat_template:
        message = "chat templates in requests are not allowed on this server (--trust-request-chat-template)"
        raise InvalidArgumentError(message, field="chat_template", reason="UNSUPPORTED_PARAMETER")


def chat(body: ChatCompletionRequest, deadline: float, limits: Limits) -> TextRequest:
    check_template(body, limits)
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    prompt = template(body.messages, body, body.offered_tools, effort)
    return text_request("chatcmpl", body, [prompt], deadline, limits)


def template(
    messages: Sequence[Message], options: TemplateOptions, tools: Sequence[Tool], variables: dict[str, Any]
) -> ApplyChatTemplateRequest:
    """The conversation for the tokenizer. Tools go as JSON text, which keeps the order of their keys."""
    return ApplyChatTemplateRequest(
        messages=[template_message(message) for message in messages],
        add_generation_prompt=options.add_generation_prompt,
        tools_json=[tool.model_dump_json(exclude_unset=True) for tool in tools],
        template_kwargs=struct(variables | (options.chat_template_kwargs or {}), "chat_template_kwargs"),
        chat_template=options.chat_template,
    )


def completion(body: CompletionRequest, deadline: float, limits: Limits) -> TextRequest:
    return text_request("cmpl", body, prompts(body.prompt), deadline, limits, body.add_special_tokens)


def text_request(
    kind: str,
    body: CommonRequest,
    prompts: Sequence[Prompt],
    deadline: float,
    limits: Limits,
    add_special_tokens: bool | None = None,
) -> TextRequest:
    num_choices = body.n or 1
    if len(prompts) * num_choices > limits.max_choices:
        wanted = f"{len(prompts)} prompts times {num_choices}"
        message = f"asks for {wanted} completions; this server takes {limits.max_choices} a request"
        raise InvalidArgumentError(message, field="n" if num_choices > 1 else "prompt")
    return TextRequest(
        request_id=f"{kind}-{uuid.uuid4().hex}",
        model=body.model or "",
        prompts=prompts,
        deadline=deadline,
        sampling_params=sampling_params(body),
        num_choices=num_choices,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        add_special_tokens=add_special_tokens is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
        bad_words=body.bad_words or (),
    )


def sampling_params(body: CommonRequest) -> SamplingParams:
    """Fields that the client left out stay out: the worker knows the defaults."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    return SamplingParams(
        **fields,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        # A prompt is only computed for a completion's sake: who wants none gets one that nobody sees.
        max_tokens=1 if body.longest_completion == 0 else body.longest_completion,
        allowed_token_ids=body.allowed_token_ids,
        prompt_logprobs=body.num_prompt_logprobs,
        structured_output=structured_output(body),
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        logprobs=body.num_logprobs,
    )


def prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """One prompt or several: only a list of ids is a single prompt and a list."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [item for item in prompt if not isinstance(item, int)]


def template_message(message: Message) -> Struct:
    fields: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    fields["content"] = message.text
    extra = {
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [template_call(call) for call in message.tool_calls] if message.tool_calls else None,
    }
    return struct({**fields, **{key: value for key, value in extra.items() if value is not None}}, "messages")


def template_call(call: ToolCall) -> dict[str, Any]:
    """Templates print arguments as JSON, so they get the object, not its text."""
    arguments = json.loads(call.function.arguments or "{}")
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def struct(values: dict[str, Any] | None, field: str) -> Struct:
    """JSON on its way into a template; InvalidArgumentError for what the wire cannot carry."""
    result = Struct()
    try:
        result.update(values or {})
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError("holds a text or number that cannot be carried", field=field) from error
    return result
