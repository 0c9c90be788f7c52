"""The gateway's /metrics tell of every worker behind it."""

from __future__ import annotations

import re

from tests.gateway.harness import MODEL, Stack, until, worker


async def test_each_worker_is_a_label(stack: Stack) -> None:
    async with worker(stack):
        text = (await stack.http.get("/metrics")).text
        serving = re.findall(r"^wint2_gateway_worker_is_serving\{(.*)\} 1.0", text, re.MULTILINE)
        assert len(serving) == 2
        assert all(f'model_name="{MODEL}",worker="127.0.0.1:' in labels for labels in serving)
        assert re.search(r"^wint2_gateway_worker_kv_cache_usage_ratio\{.*\} 0.0", text, re.MULTILINE)
    await until(lambda: len(stack.gateway.readiness.workers) == 1)
    assert (await stack.http.get("/metrics")).text.count("wint2_gateway_worker_is_serving{") == 1
