"""Limits of one client leave the others alone."""

from __future__ import annotations

import asyncio

import pytest

from gateway.quotas import Quotas, current_client
from protos.rpc.errors import OverloadedError
from tests.fakes import FakeWorker
from tests.gateway.harness import serving_stack, until


def test_a_bucket_empties_and_refills() -> None:
    now = [0.0]
    quotas = Quotas(tokens_per_minute=60, clock=lambda: now[0])
    with quotas.request(40) as charge:
        charge(50)
    with pytest.raises(OverloadedError, match="60 tokens a minute") as caught, quotas.request(1):
        pass
    assert caught.value.retry_after_seconds == 31
    now[0] = 31
    with quotas.request(1):
        pass


def test_a_bucket_holds_no_more_than_a_minute() -> None:
    now = [0.0]
    quotas = Quotas(tokens_per_minute=60, clock=lambda: now[0])
    now[0] = 3600
    with quotas.request(60):
        pass
    with pytest.raises(OverloadedError), quotas.request(1):
        pass


def test_clients_have_accounts_of_their_own() -> None:
    quotas = Quotas(max_requests=1)
    current_client.set("a")
    with quotas.request(1):
        with pytest.raises(OverloadedError, match="1 requests running"), quotas.request(1):
            pass
        current_client.set("b")
        with quotas.request(1):
            pass
    with quotas.request(1):
        pass


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_at_its_limit_gets_429_and_the_other_goes_on() -> None:
    fake = FakeWorker(completion=[70] * 1000, delay_seconds=0.01)
    async with serving_stack(fake, api_key=("a", "b"), max_requests_per_key=1) as (made, _):
        body = {"prompt": "x", "max_tokens": 1000}
        first = asyncio.create_task(made.http.post("/v1/completions", json=body, headers=bearer("a")))
        await until(lambda: len(fake.live) == 1)
        second = await made.http.post("/v1/completions", json=body, headers=bearer("a"))
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert second.headers["retry-after"] == "1"
        other = {"prompt": "x", "max_tokens": 1}
        assert (await made.http.post("/v1/completions", json=other, headers=bearer("b"))).status_code == 200
        first.cancel()


async def test_a_key_pays_for_its_tokens() -> None:
    async with serving_stack(max_tokens_per_minute_per_key=100) as (made, _):
        assert (await made.complete("x" * 60, max_tokens=50)).status_code == 200
        refused = await made.complete("x")
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 5 <= int(refused.headers["retry-after"]) <= 8
