"""`wint2 serve --tensor-parallel-size 2`: it serves, and ends when a rank does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx

from tests.e2e.conftest import RunningStack, start_stack
from tests.e2e.processes import descendants, free_port
from tests.e2e.test_serve import refusal
from tests.tiny import make_tiny_model

REQUEST = {"prompt": [10, 20, 30, 40], "max_tokens": 16, "temperature": 0, "ignore_eos": True}


def complete(url: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def start(model: Path, log: Path, size: int) -> RunningStack:
    ports = [free_port() for _ in range(3)]
    flags = ["--tensor-parallel-size", str(size), "--device", "cpu", "--num-kv-blocks", "32"]
    return RunningStack(start_stack(log, model, *ports, *flags), *ports)


def followers_of(model: Path) -> list[int]:
    """Ranks beside the worker's: they know the model from a pipe, not from their command line."""
    workers = [pid for pid in descendants(model) if "gpu_worker" in _command(pid)]
    return [int(child) for pid in workers for child in _children(pid)]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def test_two_ranks_serve_and_die_together(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 128, "moe_num_shared_experts": 0}
    model = make_tiny_model(tmp_path / "model", quantized=True, **sizes)
    two = start(model, tmp_path / "log", 2)
    assert "  device        cpu, float32, tensor parallel 2" in two.process.text
    assert complete(two.url) == complete(two.url)
    (rank,) = followers_of(model)
    os.kill(rank, signal.SIGKILL)
    assert two.process.end() == 1
    assert "rank 1 of 2 was ended by SIGKILL" in two.process.text.splitlines()[-1]
    assert "Traceback" not in two.process.text
    assert not descendants(model)


def test_a_degree_that_cannot_be_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    line = refusal("--model", tiny_model, "--device", "cpu", "--tensor-parallel-size", "2")
    assert "--tensor-parallel-size 2 ranks cannot share 64 hidden features in groups of 64" in line
