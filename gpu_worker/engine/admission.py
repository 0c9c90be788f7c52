"""What is checked at the engine's door: a request that gets past it can be run to its end."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from gpu_worker.config import EngineConfig
from gpu_worker.engine.errors import ContextLengthError, RequestError
from gpu_worker.engine.sequence import Request


def check_request(request: Request, config: EngineConfig) -> None:
    """Raises RequestError or ContextLengthError, naming the parameter and the limit."""
    vocab_size, params = config.model.vocab_size, request.params
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    _check_ids("bad_words_token_ids", chain.from_iterable(params.bad_words_token_ids), vocab_size)
    if not request.prompt_token_ids:
        raise RequestError("prompt", "must hold at least one token")
    _check_length(request, config)


def longest_total(request: Request, config: EngineConfig) -> int:
    """Tokens, prompt and completion, at which a sequence of this request ends."""
    wanted = request.params.max_tokens
    limit = min(config.scheduler.max_model_len, _capacity(config))
    return limit if wanted is None else min(limit, len(request.prompt_token_ids) + wanted)


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            known = f"the vocabulary has ids 0 to {vocab_size - 1}"
            raise RequestError(field, f"has token id {token_id} at position {position}; {known}")


def _check_length(request: Request, config: EngineConfig) -> None:
    prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
    total = prompt + (wanted or 1)
    asked = (
        f"{prompt} tokens and max_tokens {wanted}" if wanted else f"{prompt} tokens and room for a completion"
    )
    limit = config.scheduler.max_model_len
    if total > limit:
        raise ContextLengthError("prompt", f"has {asked}, {total} in all; the model's context has {limit}")
    if total > _capacity(config):
        cache = config.cache
        raise ContextLengthError(
            "prompt",
            f"has {asked}, {total} in all; the KV cache has {_capacity(config)} "
            f"({cache.num_blocks} blocks of {cache.block_size} tokens)",
        )


def _capacity(config: EngineConfig) -> int:
    return config.cache.num_blocks * config.cache.block_size
