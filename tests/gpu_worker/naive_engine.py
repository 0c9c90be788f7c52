"""What an engine has to give, the plain way: one request at a time, no cache, no batch, a rule a line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_worker.engine.uniforms import uniforms
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import EOS, VOCAB_SIZE, context_logits


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float]


def complete(prompt: list[int], params: SamplingParams, index: int, max_model_len: int) -> Completion:
    """Completion `index` of a prompt whose parameters have a seed."""
    completion: list[int] = []
    logprobs: list[float] = []
    limit = min(max_model_len - len(prompt), params.max_tokens or max_model_len)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    while True:
        own = context_logits(prompt + completion).double().numpy()
        token = _choose(_edit(own.copy(), prompt, completion, params, stops), params, index, len(completion))
        logprobs.append(float(own[token] - np.log(np.exp(own).sum())))
        completion.append(token)
        if token in stops:
            return Completion(completion, "stop", logprobs)
        if len(completion) == limit:
            return Completion(completion, "length", logprobs)


def prompt_logprobs(prompt: list[int]) -> list[float]:
    """Of each prompt token after the first."""
    rows = [
        context_logits(prompt[:end]).double().log_softmax(0)[prompt[end]] for end in range(1, len(prompt))
    ]
    return [float(row) for row in rows]


def _edit(
    logits: np.ndarray, prompt: list[int], completion: list[int], params: SamplingParams, stops: set[int]
) -> np.ndarray:
    for token, value in params.logit_bias.items():
        logits[token] += value
    for token in {*prompt, *completion}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(completion):
        logits[token] -= params.presence_penalty + params.frequency_penalty * completion.count(token)
    if params.allowed_token_ids:
        logits[sorted(set(range(VOCAB_SIZE)) - set(params.allowed_token_ids))] = -np.inf
    if len(completion) < params.min_tokens:
        logits[sorted(stops)] = -np.inf
    for *head, last in params.bad_words_token_ids:
        if len(completion) >= len(head) and completion[len(completion) - len(head) :] == head:
            logits[last] = -np.inf
    return logits


def _choose(logits: np.ndarray, params: SamplingParams, index: int, position: int) -> int:
    if params.is_greedy:
        return int(logits.argmax())
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = order[: params.top_k or None]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(mass, params.top_p)) + 1] if params.top_p < 1 else kept
    kept = np.sort(kept[probs[kept] >= params.min_p * probs.max()])
    seed = np.array([(params.seed + index) % 2**64], np.uint64)
    uniform = float(uniforms(seed, np.array([position]))[0])
    mass = np.cumsum(probs[kept])
    return int(kept[min(int(np.searchsorted(mass, uniform * mass[-1], side="right")), len(kept) - 1)])
