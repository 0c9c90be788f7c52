"""Twenty seconds of locust's users who leave in the middle, on the whole stack: no failure, no block left."""

from __future__ import annotations

import csv
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.conftest import start_stack
from tests.e2e.processes import free_port, wait_for
from tests.foreign.environments import install
from tests.tiny import make_tiny_model

LOCUST = "locust==2.47.0"
FILE = Path(__file__).with_name("locustfile.py")
FREED_WITHIN_SECONDS = 1.0


@pytest.mark.timeout(300)
def test_a_storm_of_locusts_leaves_nothing_behind(tmp_path):
    locust = install(tmp_path / "locust", LOCUST) / "locust"
    model = make_tiny_model(tmp_path / "tiny", quantized=True)
    http_port, grpc_port, worker_port = (free_port() for _ in range(3))
    stack = start_stack(tmp_path / "serve.log", model, http_port, grpc_port, worker_port)
    try:
        command = [locust, "--headless", "--locustfile", FILE, "--host", f"http://127.0.0.1:{http_port}"]
        numbers = ["--users", "60", "--spawn-rate", "60", "--run-time", "20s", "--stop-timeout", "5"]
        done = subprocess.run(
            [*command, *numbers, "--csv", tmp_path / "storm"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with (tmp_path / "storm_stats.csv").open() as file:
            counts = {row["Name"]: row for row in csv.DictReader(file)}
        assert int(counts["Aggregated"]["Failure Count"]) == 0
        assert int(counts["leaves"]["Request Count"]) > 50
        with grpc.insecure_channel(f"127.0.0.1:{worker_port}") as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            ended = time.monotonic()
            wait_for(lambda: not stub.GetLoad(worker_pb2.GetLoadRequest()).num_used_blocks, "no used blocks")
            assert time.monotonic() - ended < FREED_WITHIN_SECONDS
    finally:
        stack.kill()
