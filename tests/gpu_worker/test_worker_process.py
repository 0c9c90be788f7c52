"""`python -m gpu_worker` from outside: what it prints, serves and refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors import safe_open

from gpu_worker.facts import count_parameters
from gpu_worker.model.config_reader import read_model_config
from protos.rpc.channel import open_channel, wait_serving, watch_health
from protos.rpc.errors import from_rpc_error
from protos.wint2.common.v1.common_pb2 import (
    FINISH_REASON_STOP,
    Choices,
    SamplingParams,
    StructuredOutput,
    TokenIds,
)
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.fakes import FakeScheduler, scheduler_service, serving
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "gpu_worker", "--device", "cpu", "--listen", "127.0.0.1:0"]
SMALL = ["--num-kv-blocks", "32", "--block-size", "16", "--max-model-len", "256"]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), quantized=True)


@pytest.fixture
def damaged(tmp_path):
    """A model of its own for a test to break."""
    return make_tiny_model(tmp_path, quantized=False)


@asynccontextmanager
async def running(model, tmp_path, *flags):
    """The worker's process once SERVING, and a channel to it."""
    address = f"unix:{tmp_path}/worker.sock"
    command = [*COMMAND, "--listen", address, "--model", str(model), *SMALL, *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT)
    try:
        async with open_channel(address) as channel:
            await wait_serving(channel, "wint2.worker.v1.WorkerService", timeout_seconds=60)
            yield process, channel
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def run(model, *flags):
    command = [*COMMAND, "--model", str(model), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def assert_refused(result, *words):
    """One clear message on stderr, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.rindex("error: ") :]
    for word in words:
        assert word in message
    return message


def generate(channel, max_tokens=8, **more):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)
    request = worker_pb2.GenerateRequest(prompt=TokenIds(ids=[10, 20, 30]), sampling_params=params)
    return worker_pb2_grpc.WorkerServiceStub(channel).Generate(request)


def token_ids(events):
    return [token_id for event in events for token_id in event.delta.token_ids]


async def test_the_whole_life_of_a_worker(model, tmp_path):
    """Starts before its scheduler, serves, tells what it is, registers, drains on SIGTERM during a stream."""
    scheduler, address = FakeScheduler(), f"unix:{tmp_path}/scheduler.sock"
    flags = ["--scheduler", address, "--served-model-name", "tiny"]
    async with running(model, tmp_path, *flags) as (process, channel):
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        info = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest())
        assert (info.served_model_name, info.max_model_len, info.vocab_size) == ("tiny", 256, 300)
        assert 2 in info.eos_token_ids
        assert "wint2" in info.quantization
        assert info.weight_bytes > 0 < info.num_parameters
        server = await stub.GetServerInfo(worker_pb2.GetServerInfoRequest())
        assert (server.device, server.dtype, server.block_size, server.num_kv_blocks) == (
            "cpu",
            "float32",
            16,
            32,
        )

        first = [event async for event in generate(channel)]
        assert first[-1].finish.usage.completion_tokens == 8
        again = [event async for event in generate(channel)]
        assert token_ids(first) == token_ids(again), "greedy repeats itself"
        wanted = StructuredOutput(choice=Choices(texts=["the", "ing"]))
        chosen = [event async for event in generate(channel, structured_output=wanted)]
        assert chosen[-1].finish.reason == FINISH_REASON_STOP

        async with serving(scheduler_service(scheduler), listen=address):
            async with asyncio.timeout(10):
                while not scheduler.loads:
                    await asyncio.sleep(0.05)
            registration = scheduler.registrations[0]
            assert (registration.model, registration.address) == ("tiny", f"unix:{tmp_path}/worker.sock")
            assert registration.instance_id == server.instance_id
            assert registration.kv_cache_tokens == 32 * 16

            responses = aiter(generate(channel, max_tokens=200))
            await anext(responses)
            health = watch_health(channel)
            assert await anext(health) is True
            process.send_signal(signal.SIGTERM)
            assert await anext(health) is False
            await health.aclose()
            events = [event async for event in responses]
            assert events[-1].finish.usage.completion_tokens == 200
        _, stderr = await process.communicate()
        assert process.returncode == 0, stderr.decode()
        assert not scheduler.loads[-1].is_serving
        text = stderr.decode()
        for word in ("cpu", "wint2", "KV", "ready on unix:"):
            assert word in text


def test_parameters_are_counted_as_in_the_unquantized_checkpoint(tmp_path):
    config = read_model_config(make_tiny_model(tmp_path, quantized=False))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert count_parameters(config) == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


async def test_health_answers_while_the_model_loads(damaged, tmp_path):
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").unlink()
    os.mkfifo(damaged / "config.json")  # loading waits until somebody writes it
    address = f"unix:{tmp_path}/worker.sock"
    command = [*COMMAND, "--listen", address, "--model", str(damaged), *SMALL]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT)
    try:
        async with open_channel(address) as channel, asyncio.timeout(60):
            call = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), wait_for_ready=True
            )
            assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await worker_pb2_grpc.WorkerServiceStub(channel).GetLoad(worker_pb2.GetLoadRequest())
            assert from_rpc_error(caught.value).reason == "STARTING"
            await asyncio.to_thread((damaged / "config.json").write_text, config)
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    finally:
        process.kill()
        await process.communicate()


async def test_a_signal_while_the_model_loads_ends_at_once(damaged, tmp_path):
    (damaged / "config.json").unlink()
    os.mkfifo(damaged / "config.json")
    address = f"unix:{tmp_path}/worker.sock"
    command = [*COMMAND, "--listen", address, "--model", str(damaged)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT)
    async with open_channel(address) as channel, asyncio.timeout(60):
        await channel.channel_ready()
        process.terminate()
        await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


def test_an_unknown_model_directory_is_named(tmp_path):
    assert_refused(run(tmp_path / "absent"), "absent")


def test_broken_json_is_named(damaged):
    (damaged / "config.json").write_text('{"vocab_size": ')
    assert_refused(run(damaged), "config.json", "line 1")


def test_a_missing_key_is_named(damaged):
    config = json.loads((damaged / "config.json").read_text())
    del config["hidden_size"]
    (damaged / "config.json").write_text(json.dumps(config))
    assert_refused(run(damaged), "hidden_size")


def test_truncated_weights_are_named(damaged):
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(run(damaged), file.name)


def test_a_port_in_use_is_named_before_anything_loads(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = assert_refused(run(model, "--listen", f"127.0.0.1:{port}"), f"port {port}")
        assert_refused(run(model, "--metrics-port", str(port)), str(port))
    assert "in use" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "1"], ["--max-model-len"]),
        (["--max-model-len", "lots"], ["--max-model-len", "integer"]),
        (["--dtype", "int3"], ["--dtype"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization"]),
        (
            ["--num-kv-blocks", "8", "--kv-cache-memory-gib", "1"],
            ["--num-kv-blocks", "--kv-cache-memory-gib"],
        ),
    ],
)
def test_wrong_flags_are_named(flags, words):
    """Without torch, which takes seconds to import: `__main__` begins with this line."""
    line = (
        "from gpu_worker.settings import WorkerSettings as S; import sys; S.from_command_line(sys.argv[1:])"
    )
    command = [sys.executable, "-c", line, "--model", "m", *flags]
    assert_refused(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-model-len", "999999"], ["--max-model-len", "999999", "2048"]),
        (
            ["--tensor-parallel-size", "3"],
            ["--tensor-parallel-size 3 does not divide the model's 4 attention heads"],
        ),
        (["--tls-cert", "cert.pem"], ["--tls-key"]),
    ],
)
def test_what_the_model_or_the_machine_does_not_allow_is_named(model, flags, words):
    assert_refused(run(model, *flags), *words)


async def test_metrics_are_served_on_their_port(model, tmp_path, unused_tcp_port):
    flags = ["--metrics-port", str(unused_tcp_port), "--metrics-compat", "vllm"]
    async with running(model, tmp_path, *flags) as (_, channel):
        async for _ in generate(channel):
            pass
        label = f'{{model_name="{Path(model).name}"}}'
        # The last token is told first and counted a moment later.
        async with asyncio.timeout(10):
            while f"wint2:generation_tokens_total{label} 8.0" not in (page := await scrape(unused_tcp_port)):
                await asyncio.sleep(0.01)
        assert f"vllm:num_requests_running{label} 0.0" in page


async def scrape(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    return page
