"""The page at / and the state that it shows; its behaviour in a browser is tests/acceptance' affair."""

from __future__ import annotations

import re

import pytest

from gateway.playground import INLINE, content_security_policy
from tests.fakes import FakeWorker
from tests.gateway.harness import MODEL, Stack, serving_stack, stack, until, worker


@pytest.mark.asyncio(loop_scope="module")
async def test_the_page_needs_nothing_from_elsewhere(stack_once: Stack) -> None:
    answer = await stack_once.http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']*)""", answer.text) == ["status", "metrics"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://www.w3.org/2000/svg" in answer.text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_policy_lets_in_the_pages_own_script_and_styles_only(stack_once: Stack) -> None:
    page = (await stack_once.http.get("/")).text
    assert [kind for kind, _ in INLINE.findall(page)] == ["style", "script"]
    assert content_security_policy(page) != content_security_policy(page.replace("use strict", "use loose"))
    assert not re.search(r"""\son\w+=["']|\sstyle=["']""", page), "the policy would refuse them"


@pytest.mark.asyncio(loop_scope="module")
async def test_every_control_has_a_name(stack_once: Stack) -> None:
    page = (await stack_once.http.get("/")).text
    body = INLINE.sub("", page)
    labels = set(re.findall(r'<label for="(\w+)"', body))
    for tag in re.findall(r"<(?:input|select|textarea|meter|canvas)\b[^>]*>", body):
        [identity] = re.findall(r'\bid="([\w-]+)"', tag)
        assert identity in labels or "aria-label" in tag, tag


@pytest.mark.asyncio(loop_scope="module")
async def test_status_tells_queue_and_load(stack_once: Stack) -> None:
    status = (await stack_once.http.get("/status")).json()
    assert status["reasons"] == []
    assert status["queue"] == {"waiting": 0, "max_waiting": 1024, "placed": 0}
    [worker] = status["workers"]
    assert (worker["model"], worker["is_serving"], worker["max_num_seqs"]) == (MODEL, True, 8)
    assert worker["kv_cache_usage_ratio"] == worker["generation_tokens_per_second"] == 0


async def test_status_counts_what_runs() -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 900}
    endless = FakeWorker(completion=[70] * 1000, delay_seconds=0.01)
    async with (
        serving_stack(endless) as (made, _),
        made.http.stream("POST", "/v1/completions", json=body),
    ):
        await until(lambda: endless.live)
        assert (await made.http.get("/status")).json()["queue"]["placed"] == 1


async def test_experts_are_summed_over_workers(stack: Stack) -> None:
    async with worker(stack):
        await until(lambda: all(w.load.is_serving for w in stack.gateway.readiness.workers))
        experts = (await stack.http.get("/status")).json()["experts"]
        assert experts == [{"layer": 1, "tokens": [6, 0, 2]}, {"layer": 2, "tokens": [6, 0, 4]}]


async def test_status_says_why_nothing_can_be_asked() -> None:
    async with stack() as made:
        status = (await made.http.get("/status")).json()
        assert "no worker is registered" in status["reasons"]
        assert status["workers"] == []
