"""`wint2 serve` on real services: what it prints, how it ends, and what it says of wrong input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import start_stack
from tests.e2e.processes import BIN, descendants, free_port, plain_environment, wait_for
from tests.tiny import make_tiny_model


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", quantized=True)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "wint2", "serve", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**plain_environment(), **environment}
    )


def refusal(*arguments: str | Path) -> str:
    """The last `error:` of a start that must fail with exit code 2."""
    result = run("--port", str(free_port()), "--grpc-port", str(free_port()), *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return result.stderr[result.stderr.rindex("error: ") :].strip()


def test_the_start_says_what_it_found(stack):
    text = stack.process.text
    for part in (
        "  device        cpu, float32, tensor parallel 1",
        "  model         tiny (ernie4_5_moe), context 2048 tokens",
        "wint4",
        "wint2",
        f"  HTTP          {stack.url}/v1",
        f"  gRPC          {stack.grpc_address}",
        f"  worker gRPC   {stack.worker_address}",
    ):
        assert part in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_everything(tiny_model, tmp_path, number):
    ports = [free_port() for _ in range(3)]
    process = start_stack(tmp_path / "log", tiny_model, *ports)
    os.kill(process.process.pid, number)
    assert process.end() == 0, process.text
    assert "Traceback" not in process.text
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_worker_that_dies_ends_the_stack_with_its_reason(own_model, tmp_path):
    process = start_stack(tmp_path / "log", own_model, *[free_port() for _ in range(3)])
    os.kill(child_of(own_model, "gpu_worker"), signal.SIGKILL)
    assert process.end() == 1
    assert "error: worker was ended by SIGKILL" in process.text
    assert not descendants(own_model)


def test_nothing_outlives_a_killed_launcher(own_model, tmp_path):
    ports = [free_port() for _ in range(3)]
    process = start_stack(tmp_path / "log", own_model, *ports)
    assert len(descendants(own_model)) == 3  # launcher, tokenizer, worker; the gateway knows no model
    os.kill(process.process.pid, signal.SIGKILL)
    process.end()
    wait_for(lambda: not descendants(own_model), "all children gone")
    wait_for(lambda: not answers(ports[0]), "the gateway gone")


def child_of(model: Path, module: str) -> int:
    return next(pid for pid in descendants(model) if module in Path(f"/proc/{pid}/cmdline").read_text())


def answers(port: int) -> bool:
    try:
        return bool(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
    except httpx.HTTPError:
        return False


def test_a_port_in_use_is_named_before_anything_loads(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refusal("--model", tiny_model, "--engine-worker-queue-port", str(port))
    assert line.startswith(f"error: --engine-worker-queue-port: port {port} is in use by ")
    assert f"(pid {os.getpid()})" in line


def test_no_such_model(tmp_path):
    path = tmp_path / "nothing"
    hint = "(nothing is downloaded: give the checkpoint's directory)"
    assert refusal("--model", path) == f"error: --model: no directory {path} {hint}"


def header_bytes(weights: Path) -> int:
    return 8 + int.from_bytes(weights.read_bytes()[:8], "little")


def test_a_truncated_checkpoint(own_model):
    weights = own_model / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1000)
    text = refusal("--model", own_model)
    assert text.startswith("error: worker: ")
    there = size - 1000 - header_bytes(weights)
    assert f"model.safetensors: the file is truncated: it has {there} bytes of tensors" in text
    assert f"its header tells of {there + 1000}; " in text


def test_a_corrupt_header(own_model):
    weights = own_model / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    line = refusal("--model", own_model)
    assert line.startswith("error: worker: ")
    assert "model.safetensors" in line


def test_a_config_without_a_key(own_model):
    config = json.loads((own_model / "config.json").read_text())
    del config["num_attention_heads"]
    (own_model / "config.json").write_text(json.dumps(config))
    line = refusal("--model", own_model)
    assert line.startswith("error: worker: ")
    assert "num_attention_heads" in line


def test_fastdeploys_name_and_flags(own_model, tmp_path):
    command = [
        "-m", "wint2.entrypoints.openai.api_server", "--model", own_model / "nothing",
        "--cache-queue-port", "8183", "--splitwise-role", "prefill",
    ]  # fmt: skip
    result = subprocess.run(
        [BIN / "python", *command], capture_output=True, text=True, timeout=60, env=plain_environment()
    )
    assert result.returncode == 2
    assert result.stderr == "error: --splitwise-role: prompts and answers are computed by the same worker\n"
