"""One ready gateway a test module is enough for tests that only ask it things."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.fakes import FakeWorker
from tests.gateway.harness import Stack, serving_stack


@pytest.fixture
async def served() -> AsyncIterator[tuple[Stack, FakeWorker]]:
    async with serving_stack() as made:
        yield made


@pytest.fixture
async def stack(served: tuple[Stack, FakeWorker]) -> Stack:
    return served[0]


@pytest.fixture
async def worker(served: tuple[Stack, FakeWorker]) -> FakeWorker:
    return served[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack_once() -> AsyncIterator[Stack]:
    """For tests that leave no trace."""
    async with serving_stack() as (made, _):
        yield made
