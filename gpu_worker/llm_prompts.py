"""What callers of `LLM` may write for prompts, conversations and sampling parameters, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_worker.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

_PROMPT_KEYS = ("prompt", "prompt_token_ids")


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of token ids is one prompt; a list of anything else is a list of prompts."""
    plain: Any = _plain(prompts)
    if isinstance(plain, str | Mapping) or (_is_list(plain) and plain and isinstance(plain[0], int)):
        return [plain]
    if not _is_list(plain):
        raise TypeError(f"prompts are texts, lists of token ids, or dicts with them, not {plain!r:.80}")
    return list(plain)


def read_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """The text and the token ids of a prompt, one of them or both. TypeError says what it is instead."""
    plain: Any = _plain(prompt)
    if isinstance(plain, Mapping):
        return _read_dict(plain)
    if isinstance(plain, str):
        return plain, None
    if _is_list(plain) and all(isinstance(token_id, int) for token_id in plain):
        return None, list(plain)
    raise TypeError(f"a prompt is a text, token ids, or a dict with one of them, not {plain!r:.80}")


def read_conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation, or several; a message's parts of text are joined. TypeError names what is wrong."""
    if not _is_list(messages):
        raise TypeError(f"a conversation is a list of messages, not {messages!r:.80}")
    conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return [_read_conversation(conversation) for conversation in conversations]


def read_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not _is_list(params) or not all(isinstance(one, SamplingParams) for one in params):
        raise TypeError(f"sampling_params are SamplingParams, or a list of them, not {params!r:.80}")
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} sampling_params for {num_prompts} prompts")
    return list(params)


def _read_dict(prompt: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
    given = {name: value for name, value in prompt.items() if value is not None}
    if not given.keys() & set(_PROMPT_KEYS):
        raise TypeError(f"a prompt has neither 'prompt' nor 'prompt_token_ids' but {sorted(prompt)}")
    if unknown := sorted(given.keys() - set(_PROMPT_KEYS)):
        raise TypeError(f"a prompt of this model cannot have {', '.join(unknown)}")
    text, token_ids = (read_prompt(given[name]) if name in given else (None, None) for name in _PROMPT_KEYS)
    return text[0], token_ids[1] if token_ids[1] is not None else text[1]


def _read_conversation(messages: Messages) -> Messages:
    if not _is_list(messages):
        raise TypeError(f"a conversation is a list of messages, not {messages!r:.80}")
    return [_read_message(position, message) for position, message in enumerate(messages)]


def _read_message(position: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f"message {position} is no dict with a 'role': {message!r:.80}")
    content: Any = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise TypeError(f"message {position} has no 'content'")
    return message if not _is_list(content) else {**message, "content": _join_parts(position, content)}


def _join_parts(position: int, parts: Sequence[Any]) -> str:
    for part in parts:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise TypeError(f"message {position} has a part that is no text: {part!r:.80}")
    return "".join(part["text"] for part in parts)


def _plain(value: Any) -> Any:
    """Lists of what numpy and torch hold token ids in."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
