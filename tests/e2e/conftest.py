"""A tiny quantized model, and the whole stack that serves it, once for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.e2e.processes import BIN, Process, free_port
from tests.tiny import make_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "e2e":
            item.add_marker("e2e")


@dataclass(frozen=True)
class RunningStack:
    """`wint2 serve`, up and serving."""

    process: Process
    http_port: int
    grpc_port: int
    worker_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def worker_address(self) -> str:
        return f"127.0.0.1:{self.worker_port}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", quantized=True)


@pytest.fixture(scope="session")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    ports = [free_port() for _ in range(3)]
    log = tmp_path_factory.mktemp("stack") / "serve.log"
    running = RunningStack(start_stack(log, tiny_model, *ports), *ports)
    yield running
    running.process.kill()


def start_stack(
    log: Path, model: Path, http_port: int, grpc_port: int, worker_port: int, *flags: str | Path
) -> Process:
    """`wint2 serve` on these ports, up and serving."""
    ports = {"--port": http_port, "--grpc-port": grpc_port, "--engine-worker-queue-port": worker_port}
    words = [str(word) for pair in ports.items() for word in pair]
    serve = Process(log, BIN / "wint2", "serve", "--model", model, "--max-num-seqs", "16", *words, *flags)
    return serve.wait_line("worker gRPC")


@pytest.fixture
def client(stack: RunningStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
