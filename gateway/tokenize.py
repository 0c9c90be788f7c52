"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from gateway.chat_schemas import Message, TemplateOptions
from gateway.clients import TokenizerClient
from gateway.fields import TokenId
from gateway.readiness import Readiness
from gateway.requests import Limits
from gateway.schemas import Schema, misplaced
from gateway.translate import check_template, template

TIMEOUT_SECONDS = 60.0


class TokenizeRequest(TemplateOptions):
    """A text, or a conversation."""

    model: str | None = Field(None, description="Accepted; all models of a server share the tokenizer.")
    prompt: str | None = Field(None, description="Either this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, description="Either this or prompt.")
    add_special_tokens: bool | None = Field(None, description="For a prompt. Default true.")
    return_token_strs: bool | None = Field(None, description="Tell each token's text.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise misplaced("prompt", "", "missing")
        if self.prompt is not None and self.messages is not None:
            raise misplaced("messages", "cannot be combined with prompt")
        return self


class DetokenizeRequest(Schema):
    """Token ids."""

    model: str | None = Field(None, description="Accepted; all models of a server share the tokenizer.")
    tokens: list[TokenId]
    skip_special_tokens: bool | None = Field(None, description="Leave them out of the text. Default false.")


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


class TokenizeApi:
    """The two handlers."""

    def __init__(self, tokenizer: TokenizerClient, readiness: Readiness, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._readiness = readiness
        self._limits = limits

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation's prompt."""
        check_template(body, self._limits)
        token_ids = await self._encode(body)
        tokens: Tokens = {
            "count": len(token_ids),
            "max_model_len": max((model.max_model_len for model in self._readiness.models()), default=0),
            "tokens": token_ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            texts = await self._tokenizer.token_texts(token_ids)
            tokens["token_strs"] = [texts[token_id] for token_id in token_ids]
        return JSONResponse(tokens)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        text = await self._tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
        return JSONResponse({"prompt": text})

    async def _encode(self, body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            conversation = template(body.messages, body, body.tools or (), {})
            rendered = await self._tokenizer.apply_chat_template(conversation, TIMEOUT_SECONDS)
            return list(rendered.token_ids.ids)
        [token_ids] = await self._tokenizer.encode(
            [body.prompt or ""],
            add_special_tokens=body.add_special_tokens is not False,
            timeout=TIMEOUT_SECONDS,
        )
        return token_ids
