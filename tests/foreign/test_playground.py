"""The playground in Debian's Chromium: by keyboard, on desk and phone, light and dark, checked by axe.

SCREENSHOTS=DIR keeps the pictures.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, async_playwright, expect

from tests.fakes import FIRST_BYTE_ID, FakeWorker
from tests.gateway.harness import Stack, serving_stack, until

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 740}
ANSWER = "Paris is the capital of France.\n```python\nprint('Paris')\n```\nAsk me more."
VIEWS = ("Chat", "Parameters", "Server")


def worker(text: str = ANSWER, delay_seconds: float = 0.005) -> FakeWorker:
    token_ids = [byte + FIRST_BYTE_ID for byte in text.encode()]
    return FakeWorker(completion=token_ids, delay_seconds=delay_seconds)


@dataclass
class Seen:
    """What the page did beside what it showed."""

    problems: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def opened(stack: Stack, viewport=DESK, scheme="light") -> AsyncIterator[tuple[Page, Seen]]:
    chromium = shutil.which("chromium")
    assert chromium, "no chromium: apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport=viewport, color_scheme=scheme, device_scale_factor=2)
        seen = Seen()
        page.on("console", lambda message: message.type == "error" and seen.problems.append(message.text))
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("request", lambda request: seen.urls.append(request.url))
        await page.goto(f"http://127.0.0.1:{stack.gateway.http_port}/")
        yield page, seen
        await browser.close()


async def picture(page: Page, name: str, folder: Path) -> None:
    target = Path(os.environ.get("SCREENSHOTS", folder))
    await page.screenshot(path=target / f"{name}.png")


async def find_faults(page: Page) -> list[str]:
    found = (await Axe().run(page)).response["violations"]
    return [f"{fault['id']}: {node['html'][:120]}" for fault in found for node in fault["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_chat_by_keyboard_alone(scheme, tmp_path):
    async with serving_stack(worker()) as (stack, fake), opened(stack, scheme=scheme) as (page, seen):
        await expect(page.locator("#state")).to_have_text("fake")
        await page.keyboard.type("What is the capital")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("of France?")
        await page.keyboard.press("Enter")
        answer = page.get_by_role("article", name="Model")
        await expect(answer.locator("footer")).to_contain_text("stop")
        await expect(answer.locator("pre")).to_have_text("print('Paris')")
        await expect(page.locator("#ttft")).to_contain_text("ms")
        await expect(page.locator("#answer-tokens")).to_have_text(str(len(ANSWER) + 1))
        assert float(await page.locator("#speed").inner_text()) > 10
        assert fake.requests[0].sampling_params.temperature == pytest.approx(0.7)
        await picture(page, f"desk-{scheme}", tmp_path)
        assert await find_faults(page) == []
        assert seen.problems == []
        assert {url.split("/")[2] for url in seen.urls if not url.startswith("data:")} == {
            f"127.0.0.1:{stack.gateway.http_port}"
        }


async def test_escape_stops_and_frees_the_worker():
    async with serving_stack(worker("on and on " * 1000, 0.01)) as (stack, fake), opened(stack) as (page, _):
        await page.get_by_role("button", name="Tell me a short story").click()
        await expect(page.get_by_role("button", name="Stop")).to_be_visible()
        await expect(page.get_by_role("article", name="Model")).to_contain_text("on and on")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("article", name="Model").locator("footer")).to_contain_text("stopped")
        await until(lambda: not fake.live)
        await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_a_refusal_is_shown_and_the_next_try_works():
    async with serving_stack(worker(), api_key=("secret",)) as (stack, _), opened(stack) as (page, _seen):
        await page.get_by_label("Message", exact=True).fill("hi")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("article", name="Error")).to_contain_text("No API key provided")
        await page.get_by_label("API key").fill("secret")
        await page.get_by_label("Message", exact=True).fill("hi again")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_role("article", name="Model")).to_contain_text("Paris is the capital")


async def test_parameters_travel_and_are_remembered():
    async with serving_stack(worker()) as (stack, fake), opened(stack) as (page, _):
        await page.get_by_label("Max tokens").fill("3")
        await page.get_by_label("Seed").fill("7")
        await page.get_by_label("System message").fill("Be brief")
        await page.reload()
        await page.get_by_label("Message", exact=True).fill("hi")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("article", name="Model").locator("footer")).to_contain_text("length")
        params = fake.requests[0].sampling_params
        assert (params.max_tokens, params.seed) == (3, 7)
        prompt = bytes(token_id - FIRST_BYTE_ID for token_id in fake.requests[0].prompt.ids).decode()
        assert prompt == "system: Be brief\nuser: hi\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_shows_everything_without_scrolling_sideways(scheme, tmp_path):
    async with serving_stack(worker()) as (stack, _), opened(stack, PHONE, scheme) as (page, seen):
        await page.get_by_role("button", name="In one sentence").click()
        await expect(page.get_by_role("article", name="Model").locator("footer")).to_contain_text("stop")
        for view in VIEWS:
            await page.get_by_role("button", name=view, exact=True).click()
            assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            await picture(page, f"phone-{view.lower()}-{scheme}", tmp_path)
            assert await find_faults(page) == []
        assert seen.problems == []


async def test_the_state_tells_when_nothing_answers():
    async with serving_stack(worker()) as (stack, _), opened(stack) as (page, _seen):
        await expect(page.locator("#running")).to_have_text("0 of 8")
        await page.route("**/status", lambda route: route.abort())
        await expect(page.locator("#state")).to_have_text("the server does not answer")
        experts = [{"layer": layer, "tokens": [5 * index for index in range(64)]} for layer in range(1, 28)]
        status = (await stack.http.get("/status")).json() | {"experts": experts}
        await page.unroute("**/status")
        await page.route("**/status", lambda route: route.fulfill(body=json.dumps(status)))
        await expect(page.locator("#experts-text")).to_have_text(
            "Hottest: layer 1, expert 63, 2.0 times its layer's mean; 27 never used."
        )
