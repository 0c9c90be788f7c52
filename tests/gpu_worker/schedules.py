"""Random schedules: requests of every kind that come, go and are aborted, on engines of every size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import EOS, HashModel, make_engine

MAX_LEN = 64
Key = tuple[str, int]


def pick(rng: np.random.Generator, *options):
    return options[int(rng.integers(len(options)))]


def random_params(rng: np.random.Generator) -> SamplingParams:
    max_tokens = int(rng.integers(1, 20))
    return SamplingParams(
        temperature=pick(rng, 0.0, 0.7, 1.5),
        top_k=pick(rng, 0, 0, 3),
        top_p=pick(rng, 0.0, 0.6, 1.0, 1.0),
        min_p=pick(rng, 0.0, 0.0, 0.2),
        repetition_penalty=pick(rng, 1.0, 1.3),
        presence_penalty=pick(rng, 0.0, 0.5),
        frequency_penalty=pick(rng, 0.0, -0.5),
        logit_bias=pick(rng, {}, {5: 3.0, EOS: 2.0}),
        stop_token_ids=pick(rng, (), (7, 9)),
        bad_words_token_ids=pick(rng, (), ((4,), (5, 6), (8, 9, 10))),
        allowed_token_ids=pick(rng, (), (), tuple(range(1, 12))),
        seed=int(rng.integers(4)),
        max_tokens=max_tokens,
        min_tokens=int(rng.integers(min(max_tokens, 4) + 1)),
        ignore_eos=bool(rng.integers(2)),
        logprobs=pick(rng, None, None, 2),
        prompt_logprobs=pick(rng, None, None, None, 1),
        n=pick(rng, 1, 1, 1, 3),
    )


def random_prompt(rng: np.random.Generator, max_len: int = 30) -> list[int]:
    """Of two ids, so that prefixes are often shared."""
    return rng.integers(2, 4, int(rng.integers(1, max_len + 1))).tolist()


def random_engine(
    rng: np.random.Generator, model: HashModel | None = None, *, overlap: bool = False
) -> Engine:
    """With blocks for one sequence of the longest kind at least."""
    chunked = bool(rng.integers(2))
    return make_engine(
        model=model,
        num_blocks=int(rng.integers(13, 41)),
        block_size=4,
        max_num_seqs=int(rng.integers(1, 7)),
        max_num_batched_tokens=int(rng.integers(6, 41)) if chunked else MAX_LEN,
        max_model_len=MAX_LEN,
        enable_prefix_caching=bool(rng.integers(2)),
        enable_chunked_prefill=chunked,
        overlap=overlap,
    )


@dataclass
class Run:
    """Plays requests on an engine, `arrivals[i]` steps after the start, and gathers what each was given."""

    engine: Engine
    outputs: dict[Key, StepOutput] = field(default_factory=dict)
    num_steps: int = 0

    def play(self, requests: list[Request], arrivals: list[int], aborts: dict[str, int]) -> None:
        """`aborts` has the step before which a request is aborted."""
        left = sorted(zip(arrivals, requests, strict=True), key=lambda pair: pair[0])
        while left or self.engine.has_work:
            while left and left[0][0] <= self.num_steps:
                self.engine.add(left.pop(0)[1])
            for request_id, when in aborts.items():
                if when == self.num_steps:
                    self.engine.abort(request_id)
            self.step()
        assert self.engine.stats().num_used_blocks == 0

    def step(self) -> None:
        for output in self.engine.step():
            seen = self.outputs.setdefault((output.request_id, output.index), output)
            if seen is not output:
                seen.merge(output)
        self.engine.check_integrity()
        self.num_steps += 1
        assert self.num_steps < 5000, "a request never ends"
