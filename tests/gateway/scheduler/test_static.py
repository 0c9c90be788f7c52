"""Workers that are named instead of registering."""

from __future__ import annotations

import contextlib

import pytest

from gateway.scheduler.settings import SchedulerSettings
from gateway.scheduler.static import resolve
from tests.fakes import FakeWorker, serving, worker_service
from tests.gateway.harness import stack, until


async def test_a_named_worker_serves_and_is_missed() -> None:
    async with serving(worker_service(FakeWorker())) as address, stack(static_worker=(address,)) as made:
        await until(lambda: not made.gateway.readiness.reasons)
        assert (await made.chat("hi")).json()["choices"][0]["message"]["content"] == "user: hi\n"
        [model] = (await made.http.get("/v1/models")).json()["data"]
        assert model["num_workers"] == 1


async def test_a_named_worker_that_goes_is_not_listed() -> None:
    async with contextlib.AsyncExitStack() as worker, contextlib.AsyncExitStack() as gateway:
        address = await worker.enter_async_context(serving(worker_service(FakeWorker())))
        made = await gateway.enter_async_context(stack(static_worker=(address,)))
        await until(lambda: not made.gateway.readiness.reasons)
        await worker.aclose()
        await until(lambda: made.gateway.readiness.reasons == ["no worker is registered"])


async def test_a_name_is_all_its_addresses() -> None:
    assert "127.0.0.1:81" in await resolve(["dns:localhost:81"])
    assert await resolve(["dns:no.such.name.invalid:81", "unix:/x"]) == {"unix:/x"}


def test_a_name_needs_a_port() -> None:
    with pytest.raises(ValueError, match="needs a port"):
        SchedulerSettings(static_worker=("dns:workers",))
