"""What the pipeline asks of workers."""

from __future__ import annotations

from gateway.pipeline import affinity_key, choice_params, delta_interval_ms
from protos.wint2.common.v1.common_pb2 import SamplingParams
from tests.fakes import FakeWorker
from tests.gateway.harness import Stack


def test_many_streams_get_their_tokens_in_bursts() -> None:
    assert delta_interval_ms(64, 2500) == 0
    assert delta_interval_ms(128, 2500) == 51
    assert delta_interval_ms(500, 2500) == 200


async def test_few_streams_get_them_as_they_come(stack: Stack, worker: FakeWorker) -> None:
    await stack.complete("hi")
    assert not worker.requests[0].min_delta_interval_ms


def test_choices_have_the_seeds_that_a_worker_gives_them() -> None:
    top = (1 << 63) - 1
    assert [choice_params(SamplingParams(seed=7), choice).seed for choice in range(3)] == [7, 8, 9]
    assert choice_params(SamplingParams(seed=top), 1).seed == -top - 1
    assert not choice_params(SamplingParams(), 1).HasField("seed")


def test_equal_beginnings_like_the_same_worker() -> None:
    head = list(range(128))
    assert affinity_key([*head, 1], "") == affinity_key([*head, 2], "")
    assert affinity_key(head, "a") != affinity_key(head, "b")
