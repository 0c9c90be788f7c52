"""Processes started one by one: a worker before the gateway, a worker that is killed and comes back."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import Process, free_port, wait_for

PROMPT = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 8}


class Cluster:
    """A tokenizer, a gateway and workers, each a process of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.http_port, self.grpc_port = free_port(), free_port()
        self.processes: list[Process] = []

    def start(self, module: str, *arguments: str | Path) -> Process:
        log = self.folder / f"{len(self.processes)}-{module}.log"
        self.processes.append(Process.module(log, module, *arguments))
        return self.processes[-1]

    def tokenizer(self) -> Process:
        return self.start(
            "tokenizer_svc", "--model", self.model, "--listen", f"unix:{self.folder}/tokenizer.sock"
        )

    def worker(self, name: str = "worker") -> Process:
        address = f"unix:{self.folder}/{name}.sock"
        scheduler = f"127.0.0.1:{self.grpc_port}"
        return self.start("gpu_worker", "--model", self.model, "--listen", address, "--scheduler", scheduler)

    def gateway(self) -> Process:
        return self.start(
            "gateway", "--http-host", "127.0.0.1", "--http-port", str(self.http_port),
            "--listen", f"127.0.0.1:{self.grpc_port}", "--tokenizer", f"unix:{self.folder}/tokenizer.sock",
        )  # fmt: skip

    def health(self) -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{self.http_port}/health", timeout=5).status_code
        except httpx.HTTPError:
            return 0

    def wait_healthy(self) -> None:
        wait_for(lambda: self.health() == 200, "/health says 200")

    def complete(self) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.http_port}/v1/completions", json=PROMPT, timeout=30)

    def text(self) -> str:
        return self.complete().json()["choices"][0]["text"]


@pytest.fixture
def cluster(tiny_model: Path, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tiny_model, tmp_path)
    yield cluster
    for process in cluster.processes:
        process.kill()


def test_a_worker_may_start_before_the_gateway(cluster):
    cluster.worker().wait_line("ready")
    cluster.tokenizer()
    cluster.gateway()
    cluster.wait_healthy()
    assert cluster.complete().status_code == 200


def test_a_killed_worker_turns_health_and_comes_back(cluster):
    cluster.tokenizer()
    cluster.gateway()
    worker = cluster.worker()
    cluster.wait_healthy()
    answer = cluster.text()
    os.kill(worker.process.pid, signal.SIGKILL)
    wait_for(lambda: cluster.health() == 503, "/health says 503")
    cluster.worker()
    cluster.wait_healthy()
    assert cluster.text() == answer


def test_a_killed_gateway_finds_its_worker_again(cluster):
    cluster.tokenizer()
    cluster.worker()
    gateway = cluster.gateway()
    cluster.wait_healthy()
    os.kill(gateway.process.pid, signal.SIGKILL)
    gateway.end()
    cluster.gateway()
    cluster.wait_healthy()
    assert cluster.complete().status_code == 200


def test_with_two_workers_the_death_of_one_is_not_noticed(cluster):
    cluster.tokenizer()
    cluster.gateway()
    first = cluster.worker("first").wait_line("ready")
    cluster.worker("second").wait_line("ready")
    cluster.wait_healthy()
    answer = cluster.text()
    os.kill(first.process.pid, signal.SIGKILL)
    assert [cluster.text() for _ in range(5)] == [answer] * 5


def test_a_worker_that_stands_still_turns_health_and_ends_its_streams(cluster):
    cluster.tokenizer()
    cluster.gateway()
    worker = cluster.worker()
    cluster.wait_healthy()
    body = {**PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{cluster.http_port}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        events = response.iter_lines()
        assert next(events).startswith("data: {")
        os.kill(worker.process.pid, signal.SIGSTOP)
        wait_for(lambda: cluster.health() == 503, "/health says 503")
        *_, last, done = (line for line in events if line)
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "worker_lost"
    os.kill(worker.process.pid, signal.SIGCONT)
    cluster.wait_healthy()
    assert cluster.complete().status_code == 200
