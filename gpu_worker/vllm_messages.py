"""vLLM's wire messages (vllm.grpc.engine, as PyPI smg-grpc-proto has them) to this project's and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as vllm

from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1 import common_pb2
from protos.wint2.worker.v1 import worker_pb2

# Scalars without presence: 0 is what a client sends that has no wish.
WITHOUT_PRESENCE = (
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "n",
)
NOT_TAKEN = ("mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json")
WITH_PRESENCE = ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed")
FINISH_REASONS: Mapping[common_pb2.FinishReason.ValueType, str] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "abort",
}
FORMATS: Mapping[str, Callable[[Any], common_pb2.StructuredOutput]] = {
    "json_schema": lambda text: common_pb2.StructuredOutput(json_schema=text),
    "regex": lambda text: common_pb2.StructuredOutput(regex=text),
    "grammar": lambda text: common_pb2.StructuredOutput(grammar=text),
    "json_object": lambda _: common_pb2.StructuredOutput(json_object=common_pb2.AnyJsonObject()),
    "choice": lambda choice: common_pb2.StructuredOutput(choice=common_pb2.Choices(texts=choice.choices)),
}


def read_request(request: vllm.GenerateRequest) -> worker_pb2.GenerateRequest:
    """Raises InvalidArgumentError for what this worker does not do."""
    if request.WhichOneof("input") != "tokenized":
        message = "must be given as token ids: this worker has no tokenizer"
        raise InvalidArgumentError(message, field="tokenized")
    for name in NOT_TAKEN:
        if request.HasField(name):
            raise InvalidArgumentError("is not supported by this worker", field=name)
    return worker_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt=common_pb2.TokenIds(ids=request.tokenized.input_ids),
        sampling_params=read_params(request.sampling_params),
    )


def read_params(params: vllm.SamplingParams) -> common_pb2.SamplingParams:
    """Stop strings are left to the gateway, which has the text and aborts."""
    check_params(params)
    given: dict[str, Any] = {name: value for name in WITHOUT_PRESENCE if (value := getattr(params, name))}
    given |= {name: getattr(params, name) for name in WITH_PRESENCE if params.HasField(name)}
    return common_pb2.SamplingParams(
        **given,
        stop_token_ids=params.stop_token_ids,
        logit_bias=dict(params.logit_bias.items()),
        structured_output=read_constraint(params),
    )


def check_params(params: vllm.SamplingParams) -> None:
    """What the worker's own messages cannot even say."""
    wrong = {
        "logprobs": params.logprobs < 0,
        "prompt_logprobs": params.prompt_logprobs < 0,
        "logit_bias": any(token_id < 0 for token_id in params.logit_bias),
        "truncate_prompt_tokens": params.HasField("truncate_prompt_tokens"),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            message = "has a value that this worker does not take"
            raise InvalidArgumentError(message, field=f"sampling_params.{name}")


def read_constraint(params: vllm.SamplingParams) -> common_pb2.StructuredOutput | None:
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    if kind not in FORMATS:
        raise InvalidArgumentError("is not supported by this worker", field=f"sampling_params.{kind}")
    return FORMATS[kind](getattr(params, kind))


@dataclass(slots=True)
class Answer:
    """The way back of one request: `add` each of the worker's messages, send what it returns.

    A stream gets a chunk a delta, then a `complete` that repeats the last one; otherwise all is in the
    `complete`.
    """

    request: vllm.GenerateRequest
    _info: worker_pb2.PromptInfo = field(default_factory=worker_pb2.PromptInfo)
    _deltas: dict[int, worker_pb2.Delta] = field(default_factory=dict)

    def add(self, response: worker_pb2.GenerateResponse) -> list[vllm.GenerateResponse]:
        kind = response.WhichOneof("event")
        if kind == "prompt_info":
            self._info = response.prompt_info
            return []
        if kind == "finish":
            return [vllm.GenerateResponse(complete=self._complete(response.finish))]
        return self._extend(response.delta)

    def _extend(self, delta: worker_pb2.Delta) -> list[vllm.GenerateResponse]:
        is_first = delta.index not in self._deltas
        if is_first or self.request.stream:
            self._deltas[delta.index] = delta
        else:
            self._deltas[delta.index].MergeFrom(delta)
        if not self.request.stream:
            return []
        chunk = vllm.GenerateStreamChunk(
            token_ids=delta.token_ids,
            completion_tokens=len(delta.token_ids),
            output_logprobs=self._output_logprobs(delta),
            input_logprobs=self._input_logprobs() if is_first else None,
            **self._common(delta.index),
        )
        return [vllm.GenerateResponse(chunk=chunk)]

    def _complete(self, finish: worker_pb2.Finish) -> vllm.GenerateComplete:
        delta = self._deltas.get(finish.index, worker_pb2.Delta())
        is_own = finish.stop_token_id in self.request.sampling_params.stop_token_ids
        return vllm.GenerateComplete(
            output_ids=delta.token_ids,
            completion_tokens=len(delta.token_ids),
            finish_reason=FINISH_REASONS[finish.reason],
            output_logprobs=self._output_logprobs(delta),
            input_logprobs=self._input_logprobs(),
            matched_token_id=finish.stop_token_id if is_own else None,
            **self._common(finish.index),
        )

    def _common(self, index: int) -> dict[str, int]:
        info = self._info
        return {"index": index, "prompt_tokens": info.prompt_tokens, "cached_tokens": info.cached_tokens}

    def _output_logprobs(self, delta: worker_pb2.Delta) -> vllm.OutputLogProbs | None:
        if not delta.logprobs:
            return None
        return vllm.OutputLogProbs(
            token_logprobs=[position.sampled.logprob for position in delta.logprobs],
            token_ids=[position.sampled.token_id for position in delta.logprobs],
            top_logprobs=tops(delta.logprobs),
        )

    def _input_logprobs(self) -> vllm.InputLogProbs | None:
        """The prompt's first token has no probability."""
        scored = self._info.prompt_logprobs
        if not scored:
            return None
        values = [vllm.InputTokenLogProb(value=position.sampled.logprob) for position in scored]
        return vllm.InputLogProbs(
            token_logprobs=[vllm.InputTokenLogProb(), *values],
            token_ids=self.request.tokenized.input_ids,
            top_logprobs=[vllm.TopLogProbs(), *tops(scored)],
        )


def tops(positions: Iterable[common_pb2.PositionLogprobs]) -> Sequence[vllm.TopLogProbs]:
    return [
        vllm.TopLogProbs(
            values=[token.logprob for token in position.top],
            token_ids=[token.token_id for token in position.top],
        )
        for position in positions
    ]
