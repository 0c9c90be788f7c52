"""The stack as an operator runs it: mutual TLS on every hop, HTTPS, JSON logs, one trace over all."""

from __future__ import annotations

import json
import ssl
from collections import defaultdict
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from protos.wint2.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from tests.certificates import Certificates, make_certificates
from tests.e2e.conftest import RunningStack, start_stack
from tests.e2e.processes import free_port, wait_for

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPANS = {
    "POST /v1/chat/completions",
    "wint2.tokenizer.v1.TokenizerService/ApplyChatTemplate",
    "wint2.worker.v1.WorkerService/Generate",
    "queue",
    "prefill",
    "decode",
}
PARENT = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it is sent: spans by trace, each with its service's name."""

    traces: dict[str, dict[str, tuple[str, object]]] = field(default_factory=lambda: defaultdict(dict))

    def Export(self, request, context):
        for resource in request.resource_spans:
            attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                found = attributes["service.name"], span
                self.traces[span.trace_id.hex()][span.span_id.hex()] = found
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True)
class Production:
    stack: RunningStack
    files: Certificates
    collector: Collector

    def log(self) -> list[dict]:
        lines = self.stack.process.text.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def access_lines(self, request_id: str) -> list[dict]:
        found = [line for line in self.log() if line["logger"] == "gateway.access"]
        return [line for line in found if line.get("request_id") == request_id]

    def http(self) -> httpx.Client:
        trusting = ssl.create_default_context(cafile=str(self.files.authority))
        url = self.stack.url.replace("http://127.0.0.1", "https://localhost")
        return httpx.Client(base_url=url, verify=trusting, timeout=30)

    def channel(self) -> grpc.Channel:
        pem = [path.read_bytes() for path in (self.files.authority, self.files.key, self.files.certificate)]
        return grpc.secure_channel(self.stack.grpc_address, grpc.ssl_channel_credentials(*pem))


@pytest.fixture(scope="module")
def production(tiny_model, tmp_path_factory) -> Iterator[Production]:
    folder = tmp_path_factory.mktemp("production")
    files, collector, ports = make_certificates(folder), Collector(), [free_port() for _ in range(3)]
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pair = ("tls-cert", files.certificate), ("tls-key", files.key)
    flags = [("--" + name, path) for name, path in (*pair, ("tls-ca", files.authority))]
    flags += [("--http-" + name, path) for name, path in pair]
    words = [word for flag in flags for word in flag]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector_port}")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        more = ["--tls-client-auth", "--log-format", "json"]
        process = start_stack(folder / "log", tiny_model, *ports, *words, *more)
    yield Production(RunningStack(process, *ports), files, collector)
    process.kill()
    server.stop(0)


def test_https_answers_and_logs_its_speed_as_fields(production):
    body = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True}
    with production.http() as http:
        assert http.post("/v1/completions", json=body, headers={"x-request-id": "mine"}).status_code == 200
    wait_for(lambda: production.access_lines("mine"), "the access line")
    [access] = production.access_lines("mine")
    assert access["completion_tokens"] == 8
    assert access["time_to_first_token_seconds"] > 0
    assert access["tokens_per_second"] > 0
    assert {line["service"] for line in production.log()} >= {"gateway", "tokenizer", "worker"}


def test_grpc_takes_those_with_a_certificate_only(production):
    with production.channel() as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        params = {"max_tokens": 4, "ignore_eos": True}
        request = gateway_pb2.GenerateRequest(text="hello", sampling_params=params)
        [completion] = stub.Generate(request, timeout=20).completions
        assert completion.finish.usage.completion_tokens == 4
    credentials = grpc.ssl_channel_credentials(production.files.authority.read_bytes())
    with grpc.secure_channel(production.stack.grpc_address, credentials) as stranger:
        stub = gateway_pb2_grpc.GatewayServiceStub(stranger)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_request_is_one_trace_over_three_processes(production):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "ignore_eos": True}
    with production.http() as http:
        assert http.post("/v1/chat/completions", json=body, headers=PARENT).status_code == 200
    trace = production.collector.traces[TRACE_ID]
    wait_for(lambda: {span.name for _, span in list(trace.values())} >= SPANS, "all spans")
    assert {service for service, _ in trace.values()} == {"wint2-gateway", "wint2-tokenizer", "wint2-worker"}
    assert not [span.name for _, span in trace.values() if span.status.code]
    names = {span.name: (service, span) for service, span in trace.values()}
    service, root = names["POST /v1/chat/completions"]
    assert (service, root.parent_span_id.hex()) == ("wint2-gateway", "b7ad6b7169203331")
    _, worker = names["wint2.worker.v1.WorkerService/Generate"]
    assert worker.parent_span_id == root.span_id
    for phase in ("queue", "prefill", "decode"):
        assert names[phase][1].parent_span_id == worker.span_id
    attributes = {item.key: item.value for item in root.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 4
    assert attributes["http.response.status_code"].int_value == 200
