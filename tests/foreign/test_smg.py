"""PyPI smg, a gateway of others, drives a worker as if it were vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest

from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.processes import Process, free_port, wait_for
from tests.foreign.environments import install
from tests.tiny import make_tiny_model

SMG = "smg==1.13.0"


@pytest.fixture(scope="module")
def smg(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("smg"), SMG) / "smg"


@pytest.fixture(scope="module")
def ports() -> tuple[int, int, int]:
    return free_port(), free_port(), free_port()


@pytest.fixture(scope="module")
def url(smg, ports, tmp_path_factory) -> Iterator[str]:
    """smg's address, before a worker on the tiny model, whose tokenizer smg gets from the worker."""
    worker_port, port, metrics_port = ports
    folder = tmp_path_factory.mktemp("worker")
    model = make_tiny_model(folder / "tiny", quantized=True)
    flags = ["--model", model, "--listen", f"127.0.0.1:{worker_port}", "--vllm-grpc"]
    worker = Process.module(folder / "worker.log", "gpu_worker", *flags).wait_line("ready on")
    addresses = ["--worker-urls", f"grpc://127.0.0.1:{worker_port}", "--host", "127.0.0.1"]
    numbers = ["--port", str(port), "--prometheus-port", str(metrics_port)]
    foreign = Process(folder / "smg.log", smg, "launch", *addresses, *numbers, "--model-path", model)
    try:
        foreign.wait_line("Successfully connected gRPC client (vllm)")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        foreign.kill()
        worker.kill()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def chat(client: openai.OpenAI, **fields):
    messages = [{"role": "user", "content": "hello"}]
    return client.chat.completions.create(model="tiny", messages=messages, temperature=0, **fields)


def test_the_model_is_offered(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client, max_tokens=12, logprobs=True, top_logprobs=2)
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.content) > 0
    chunks = list(chat(client, max_tokens=12, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_stop_strings_end_where_the_gateway_finds_them(client):
    request = {"model": "tiny", "prompt": "hello world", "temperature": 0, "max_tokens": 12}
    text = client.completions.create(**request).choices[0].text
    stop = text[4:6]
    stopped = client.completions.create(**request, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_a_wrong_parameter_is_a_400(client):
    with pytest.raises(openai.BadRequestError):
        chat(client, max_tokens=5000)


def test_a_client_that_leaves_frees_the_workers_blocks(client, ports):
    with chat(client, max_tokens=2000, stream=True) as stream:
        next(iter(stream))
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        wait_for(lambda: not stub.GetLoad(worker_pb2.GetLoadRequest()).num_used_blocks, "no used blocks")
