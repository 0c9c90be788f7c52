"""A request's whole life: encode, find a place, generate, decode. HTTP and gRPC are two views of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, closing
from functools import partial

from gateway.clients import Placement, SchedulerClient, TokenizerClient, WorkerClient
from gateway.completion import Completion, stop_token_ids
from gateway.deadline import remaining
from gateway.merge import merge
from gateway.metrics import GatewayMetrics
from gateway.quotas import Quotas
from gateway.requests import EncodedPrompt, Event, Prompt, TextPiece, TextRequest
from gateway.thinking import in_two_parts
from protos.rpc.errors import InvalidArgumentError, UnavailableError
from protos.wint2.common.v1.common_pb2 import SamplingParams, TokenIds
from protos.wint2.scheduler.v1.scheduler_pb2 import ScheduleRequest
from protos.wint2.tokenizer.v1.tokenizer_pb2 import ApplyChatTemplateRequest, DetokenizeOptions
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# The end of a prompt that the beginning of a completion's text depends on; a character is at most four bytes.
JOINT_TOKENS = 8
# Prompts that agree in so many tokens (two KV blocks) like the same worker.
AFFINITY_TOKENS = 128
SEEDS = 1 << 64
SHORT_INTERVAL_MS = 30  # about a step of an engine: waiting so long gathers no more than one token


class Pipeline:
    """Shares its clients among all requests; owns nothing that belongs to one request."""

    def __init__(
        self,
        tokenizer: TokenizerClient,
        scheduler: SchedulerClient,
        workers: WorkerClient,
        metrics: GatewayMetrics,
        quotas: Quotas,
        max_deltas_per_second: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self._workers = workers
        self._metrics = metrics
        self._quotas = quotas
        self._max_deltas_per_second = max_deltas_per_second
        self._num_choices = 0

    async def encode(self, request: TextRequest) -> list[EncodedPrompt]:
        """Every prompt as token ids; the bad words too, in the request's sampling parameters."""
        if request.bad_words:
            request.sampling_params.bad_words_token_ids.extend(await self._encode_bad_words(request))
        if len(request.prompts) == 1:
            return [await self._encode(request.prompts[0], request)]
        return list(await asyncio.gather(*(self._encode(prompt, request) for prompt in request.prompts)))

    async def run(self, request: TextRequest, prompts: Sequence[EncodedPrompt]) -> AsyncGenerator[Event]:
        """The events of all choices, each choice's in order. Closing the iterator cancels everything."""
        choices = [
            self._choice(index, request, prompts[index // request.num_choices].token_ids)
            for index in range(len(prompts) * request.num_choices)
        ]
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        with self._quotas.request(num_prompt_tokens) as charge, self._metrics.in_flight():
            async with aclosing(merge(choices)) as events:
                async for event in events:
                    if isinstance(event, TextPiece):
                        charge(len(event.token_ids))
                    yield event

    async def _encode(self, prompt: Prompt, request: TextRequest) -> EncodedPrompt:
        timeout = remaining(request.deadline)
        if isinstance(prompt, ApplyChatTemplateRequest):
            rendered = await self.tokenizer.apply_chat_template(prompt, timeout)
            return EncodedPrompt(rendered.token_ids.ids, rendered.text)
        if not isinstance(prompt, str):
            return EncodedPrompt(prompt)
        [token_ids] = await self.tokenizer.encode(
            [prompt], add_special_tokens=request.add_special_tokens, timeout=timeout
        )
        if not token_ids:
            raise InvalidArgumentError("the prompt has no tokens", field="prompt")
        return EncodedPrompt(token_ids, prompt)

    async def _encode_bad_words(self, request: TextRequest) -> list[TokenIds]:
        """A word is other tokens behind a blank than at the beginning."""
        ways = [way for word in request.bad_words for way in (word, f" {word.lstrip()}")]
        runs = await self.tokenizer.encode(
            ways, add_special_tokens=False, timeout=remaining(request.deadline)
        )
        return [TokenIds(ids=run) for run in dict.fromkeys(map(tuple, runs)) if run]

    async def _choice(self, index: int, request: TextRequest, prompt: Sequence[int]) -> AsyncGenerator[Event]:
        """One completion. Until its first token is out, a worker that fails is replaced by another."""
        schedule = schedule_request(index, request, prompt)
        generate = generate_request(index, request, prompt)
        generate.min_delta_interval_ms = delta_interval_ms(self._num_choices, self._max_deltas_per_second)
        with self._counted(), self._metrics.observe_choice() as observer:
            while True:
                async with self.scheduler.place(schedule, remaining(request.deadline)) as placement:
                    try:
                        async with aclosing(self._completion(index, request, generate, placement)) as events:
                            async for event in events:
                                if observer.on_event(event):
                                    yield event
                        return
                    except UnavailableError as error:
                        schedule.excluded_worker_ids.append(placement.placed.worker_id)
                        is_last = len(schedule.excluded_worker_ids) == MAX_ATTEMPTS
                        if is_last or observer.has_tokens or error.reason == "TOKENIZER_LOST":
                            raise
                        logger.warning("%s; trying another worker", error)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_choices += 1
        try:
            yield
        finally:
            self._num_choices -= 1

    def _completion(
        self, index: int, request: TextRequest, generate: GenerateRequest, placement: Placement
    ) -> AsyncGenerator[Event]:
        attempt = partial(self._attempt, index, request, placement)
        return in_two_parts(attempt, generate, request.thinking) if request.thinking else attempt(generate)

    async def _attempt(
        self, index: int, request: TextRequest, placement: Placement, generate: GenerateRequest
    ) -> AsyncGenerator[Event]:
        options = DetokenizeOptions(
            skip_special_tokens=request.skip_special_tokens,
            stop=request.stop,
            include_stop=request.include_stop,
            prefix_token_ids=generate.prompt.ids[-JOINT_TOKENS:],
        )
        completion = Completion(
            index,
            stop_token_ids(generate.sampling_params, placement.placed.eos_token_ids),
            partial(self.tokenizer.session, options),
            include_stop=request.include_stop,
        )
        timeout = remaining(request.deadline)
        address, lost = placement.placed.address, placement.lost
        with (
            closing(completion),
            self._workers.generate(address, generate, completion, timeout=timeout, lost=lost),
        ):
            async with aclosing(completion.events()) as events:
                async for event in events:
                    yield event


def delta_interval_ms(num_choices: int, max_deltas_per_second: float) -> int:
    """How long a choice's tokens gather so that all together stay under the rate; 0 if that is short."""
    interval_ms = int(num_choices / max_deltas_per_second * 1e3)
    return interval_ms if interval_ms > SHORT_INTERVAL_MS else 0


def schedule_request(index: int, request: TextRequest, prompt: Sequence[int]) -> ScheduleRequest:
    schedule = ScheduleRequest(
        request_id=f"{request.request_id}-{index}",
        model=request.model,
        prompt_tokens=len(prompt),
        max_tokens=request.sampling_params.max_tokens,
        priority=request.priority,
    )
    if len(prompt) >= AFFINITY_TOKENS:
        schedule.affinity_key = affinity_key(prompt, request.cache_salt or "")
    return schedule


def affinity_key(prompt: Sequence[int], cache_salt: str) -> int:
    """Equal for prompts that can share their first blocks in a prefix cache."""
    head = array("I", prompt[:AFFINITY_TOKENS]).tobytes()
    digest = hashlib.blake2b(head, digest_size=8, key=cache_salt.encode()[:64]).digest()
    return int.from_bytes(digest, "little")


def generate_request(index: int, request: TextRequest, prompt: Sequence[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"{request.request_id}-{index}",
        prompt=TokenIds(ids=prompt),
        sampling_params=choice_params(request.sampling_params, index % request.num_choices),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def choice_params(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of a prompt's choice. Its seed is the one that a worker gives it for `n`."""
    if choice == 0 or not params.HasField("seed"):
        return params
    own = SamplingParams()
    own.CopyFrom(params)
    own.seed = (params.seed + choice + SEEDS // 2) % SEEDS - SEEDS // 2
    return own
