"""Sampler: what a request wishes is done to its row and no other (test_sampling.py has the draw itself)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.engine.penalties import Penalties, Strengths
from gpu_worker.engine.sampler import Sampler
from gpu_worker.engine.sequence import Request, Sequence
from gpu_worker.engine.sequence_table import SequenceTable
from gpu_worker.engine.uniforms import uniforms
from gpu_worker.sampling_params import SamplingParams


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position():
    seeds, positions = np.arange(200, dtype=np.uint64).repeat(50), np.tile(np.arange(50), 200)
    numbers = uniforms(seeds, positions)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(set(numbers.tolist())) == len(numbers)
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi square, 19 degrees of freedom, p = 0.0007
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


class Rows:
    """A sampler and a table of one-token prompts, without an engine around them."""

    def __init__(
        self, *params: SamplingParams, vocab_size: int = 16, stop_ids: tuple[int, ...] = (1,)
    ) -> None:
        self.table = SequenceTable(len(params), 32, 4)
        self.sampler = Sampler(self.table, len(params), vocab_size, torch.device("cpu"))
        for i, one in enumerate(params):
            request = Request(str(i), [2], one)
            tokens = np.array([2], np.int32)
            sequence = Sequence(request, 0, (0.0, i, 0), one.seed or 0, 32, stop_ids, tokens)
            self.table.attach(sequence, [], 0)
            self.sampler.attach(sequence)

    def step(self, logits: torch.Tensor, rows: list[int] | None = None):
        at = self.table.rows if rows is None else np.array(rows)
        samples = self.sampler.read(self.sampler.draw(logits.clone(), at))
        self.table.append_unknown(at)
        self.table.reveal(at, self.table.num_tokens[at], samples.token_ids)
        return samples


def test_a_row_does_not_know_its_neighbours():
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.7),
        SamplingParams(seed=3, top_k=4, temperature=0.5),
        SamplingParams(seed=4, repetition_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(seed=5, logit_bias={3: 4.0}),
    ]
    together = Rows(*params, vocab_size=1500)
    alone = [Rows(one, vocab_size=1500) for one in params]
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randn(len(params), 1500) * 3
        batch = together.step(logits).token_ids.tolist()
        for i, row in enumerate(alone):
            assert row.step(logits[i : i + 1]).token_ids.tolist() == [batch[i]]


def test_penalties_follow_their_formulas():
    penalties, row = Penalties(1, 8, torch.device("cpu")), torch.tensor([0])
    strengths = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    request = Request("r", [1, 2], SamplingParams(**strengths))
    sequence = Sequence(request, 0, (0.0, 0, 0), 0, 9, (), np.array([1, 2, 2], np.int32))
    penalties.set_row(0, sequence)  # prompt 1 2, completion 2, then 3 3
    for _ in range(2):
        penalties.add(row, torch.tensor([3]), Strengths(*(torch.tensor([one]) for one in strengths.values())))
    logits = torch.tensor([[1.0, -1.0, 2.0, 4.0, 5.0, 0, 0, 0]])
    penalties.apply(logits, torch.tensor([0]), row)
    expected = [1.0, -2.0, 1.0 - 0.5 - 0.25, 2.0 - 1.0 - 0.25, 5.0, 0, 0, 0]
    assert logits[0].tolist() == expected


def test_no_stop_before_min_tokens():
    rows = Rows(SamplingParams(temperature=0.0, min_tokens=2, max_tokens=9), stop_ids=(5, 6))
    logits = torch.zeros(1, 16)
    logits[0, 5], logits[0, 6], logits[0, 7] = 3.0, 2.0, 1.0
    assert [rows.step(logits).token_ids[0] for _ in range(3)] == [7, 7, 5]


def test_logprobs_are_the_models_own():
    rows = Rows(
        SamplingParams(temperature=0.0, logit_bias={2: 100.0}, logprobs=2), SamplingParams(), vocab_size=4
    )
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    samples = rows.step(logits)
    expected = torch.log_softmax(logits[0], dim=-1)
    assert list(samples.logprobs) == [0]
    position = samples.logprobs[0]
    assert (position.sampled.token_id, position.sampled.logprob) == (2, pytest.approx(float(expected[2])))
    assert [top.token_id for top in position.top] == [1, 3]
    assert [top.logprob for top in position.top] == pytest.approx([float(expected[1]), float(expected[3])])


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(top_p=0.5)]
)
def test_rows_without_a_finite_choice_are_told_apart(params):
    rows = Rows(*[params] * 4)
    logits = torch.randn(4, 16)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    assert list(rows.step(logits).errors) == [1, 2]
