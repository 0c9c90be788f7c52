"""`wint2 serve` with the tests' tiny model, from the project's environment; the clients are in another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("WINT2_BIN", ROOT / ".venv" / "bin"))
MAKE_MODEL = """
import sys
from pathlib import Path
from tests.tiny import make_tiny_model
make_tiny_model(Path(sys.argv[1]), quantized=True)
"""
# Offline log-probabilities of token lists, one JSON list a line.
SCORE = """
import json, sys
from wint2 import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", skip_tokenizer_init=True)
params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
for output in llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False):
    found = [entry and next(iter(entry.values())) for entry in output.prompt_logprobs]
    print("SCORES", json.dumps([getattr(one, "logprob", one) for one in found]))
"""


@dataclass(frozen=True)
class Server:
    """Where it listens, and the model it serves."""

    url: str
    model: Path

    def score(self, prompts: list[list[int]]) -> list[list[float | None]]:
        """The offline engine's log-probabilities of the prompts' tokens."""
        done = python(SCORE, str(self.model), json.dumps(prompts))
        return [json.loads(line[7:]) for line in done.splitlines() if line.startswith("SCORES ")]


def python(source: str, *arguments: str) -> str:
    """Runs a program in the project's environment; its output."""
    command = [str(BIN / "python"), "-c", source, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), check=True, text=True, stdout=-1).stdout


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRPC_VERBOSITY": "ERROR"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "LITELLM_LOCAL_MODEL_COST_MAP"):
            patch.setenv(name, "True")
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("model") / "tiny"
    python(MAKE_MODEL, str(model))
    ports = [free_port() for _ in range(3)]
    flags = dict(zip(("--port", "--grpc-port", "--engine-worker-queue-port"), map(str, ports), strict=True))
    words = [word for pair in flags.items() for word in pair]
    command = [str(BIN / "wint2"), "serve", "--model", str(model), "--max-num-seqs", "16", *words]
    log_path = tmp_path_factory.getbasetemp() / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        wait_ready(f"http://127.0.0.1:{ports[0]}", process, log_path)
        yield Server(f"http://127.0.0.1:{ports[0]}", model)
    finally:
        process.terminate()
        process.wait(30)


def wait_ready(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not ready")
