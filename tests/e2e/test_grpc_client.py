"""Raw grpcio against the running stack: text API, token API, health, reflection, error details."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from protos.wint2.common.v1 import common_pb2
from protos.wint2.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

SERVICES = ("wint2.gateway.v1.GatewayService", "wint2.scheduler.v1.SchedulerService")
GREEDY = common_pb2.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def channel(stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.grpc_address) as channel:
        yield channel


@pytest.fixture
def worker_channel(stack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(stack.worker_address) as channel:
        yield channel


@pytest.fixture
def gateway(channel) -> gateway_pb2_grpc.GatewayServiceStub:
    return gateway_pb2_grpc.GatewayServiceStub(channel)


def test_generate_stream_says_what_http_says(gateway, client):
    request = gateway_pb2.GenerateStreamRequest(text="The answer is", sampling_params=GREEDY)
    *deltas, last = gateway.GenerateStream(request, timeout=30)
    http = client.completions.create(
        model="tiny", prompt="The answer is", temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert "".join(message.delta.text for message in deltas) == http.choices[0].text
    assert last.finish.reason == common_pb2.FINISH_REASON_LENGTH
    assert last.finish.usage.completion_tokens == 12
    assert sum(len(message.delta.token_ids) for message in deltas) == 12


def test_chat_stream(gateway):
    message = gateway_pb2.ChatMessage(role="user", content="Hello")
    request = gateway_pb2.ChatStreamRequest(messages=[message], sampling_params=GREEDY)
    events = [event.WhichOneof("event") for event in gateway.ChatStream(request, timeout=30)]
    assert events[-1] == "finish"
    assert (events[0], set(events[1:-1])) == ("start", {"delta"})


def test_list_models(gateway):
    (model,) = gateway.ListModels(gateway_pb2.ListModelsRequest(), timeout=10).models
    assert (model.id, model.max_model_len, model.num_workers) == ("tiny", 2048, 1)
    assert "wint2" in model.quantization


def test_the_scheduler_shows_its_worker(channel, stack):
    scheduler = scheduler_pb2_grpc.SchedulerServiceStub(channel)
    (worker,) = scheduler.ListWorkers(scheduler_pb2.ListWorkersRequest(), timeout=10).workers
    assert worker.registration.address == stack.worker_address
    assert worker.load.is_serving
    assert scheduler.GetQueue(scheduler_pb2.GetQueueRequest(), timeout=10).max_waiting > 0


def test_token_ids_straight_from_the_worker(worker_channel):
    worker = worker_pb2_grpc.WorkerServiceStub(worker_channel)
    prompt = common_pb2.TokenIds(ids=[5, 6, 7])
    request = worker_pb2.GenerateRequest(prompt=prompt, sampling_params=GREEDY)
    events = list(worker.Generate(request, timeout=30))
    assert events[0].prompt_info.prompt_tokens == 3
    assert sum(len(event.delta.token_ids) for event in events[1:-1]) == 12
    assert events[-1].finish.usage.completion_tokens == 12
    info = worker.GetServerInfo(worker_pb2.GetServerInfoRequest(), timeout=10)
    assert (info.device, info.dtype, info.block_size) == ("cpu", "float32", 64)


def test_a_cancelled_stream_frees_its_blocks(worker_channel):
    worker = worker_pb2_grpc.WorkerServiceStub(worker_channel)
    params = common_pb2.SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
    prompt = common_pb2.TokenIds(ids=[5, 6, 7])
    stream = worker.Generate(worker_pb2.GenerateRequest(prompt=prompt, sampling_params=params), timeout=60)
    next(stream), next(stream)
    await_load(worker, lambda load: load.num_running == 1 and load.num_used_blocks > 0)
    stream.cancel()
    await_load(worker, lambda load: load.num_running == 0 and load.num_used_blocks == 0)


def await_load(worker, wanted, timeout_seconds=30.0):
    """The worker tells of a state at most a twentieth of a second old."""
    end = time.monotonic() + timeout_seconds
    while not wanted(load := worker.GetLoad(worker_pb2.GetLoadRequest())):
        assert time.monotonic() < end, load
        time.sleep(0.02)


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health(channel, service):
    request = health_pb2.HealthCheckRequest(service=service)
    response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_tells_the_services_and_their_messages(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("wint2.gateway.v1.GatewayService")
    assert "GenerateStreamRequest" in [message.name for message in file.message_type]


def status_of(call: Iterator[object]) -> tuple[grpc.StatusCode, str, error_details_pb2.ErrorInfo, str]:
    """Code, message, ErrorInfo and the field named in BadRequest of the error that a stream ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(caught.value).details:
        for target in (info, bad):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return caught.value.code(), caught.value.details(), info, field


def test_an_unknown_model(gateway):
    request = gateway_pb2.GenerateStreamRequest(model="gpt-9", text="x")
    code, message, info, _ = status_of(gateway.GenerateStream(request, timeout=10))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "gpt-9" in message
    assert info.domain == "wint2"


def test_a_prompt_beyond_the_context(gateway):
    request = gateway_pb2.GenerateStreamRequest(token_ids=common_pb2.TokenIds(ids=[5] * 2100))
    code, message, info, _ = status_of(gateway.GenerateStream(request, timeout=10))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "2100" in message
    assert "2048" in message


def test_a_value_out_of_range(gateway):
    params = common_pb2.SamplingParams(temperature=9)
    request = gateway_pb2.GenerateStreamRequest(text="x", sampling_params=params)
    code, message, _, field = status_of(gateway.GenerateStream(request, timeout=10))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in field
    assert "between 0" in message


def test_a_request_without_a_prompt(gateway):
    code, _, _, field = status_of(gateway.GenerateStream(gateway_pb2.GenerateStreamRequest(), timeout=10))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in field or "text" in field
