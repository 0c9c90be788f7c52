"""Trace contexts pass through every service; spans only where a collector is named."""

from __future__ import annotations

import pytest
from opentelemetry import trace

from protos.rpc.errors import NotFoundError
from protos.rpc.settings import ServiceSettings
from protos.rpc.telemetry import outgoing_metadata
from protos.rpc.tracing import configure_tracing, server_span, trace_headers

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_a_collector_the_callers_context_is_passed_on():
    with server_span("call", {"traceparent": PARENT, "tracestate": "a=1"}, {}) as span:
        assert not span.is_recording()
        assert trace_headers() == {"traceparent": PARENT, "tracestate": "a=1"}
        assert ("traceparent", PARENT) in outgoing_metadata()
    assert trace_headers() == {}


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": "00-0-0-01"}])
def test_no_context_and_nonsense_begin_nothing(headers):
    with server_span("call", headers, {}):
        assert outgoing_metadata() == ()


def test_errors_go_through():
    with pytest.raises(NotFoundError), server_span("call", {"traceparent": PARENT}, {}):
        raise NotFoundError("no")
    assert not trace.get_current_span().get_span_context().is_valid


def test_no_endpoint_configures_nothing():
    before = trace.get_tracer_provider()
    configure_tracing("gateway", None)
    assert trace.get_tracer_provider() is before


def test_the_endpoint_comes_from_the_flag_or_opentelemetrys_variables(monkeypatch):
    def endpoint(**flags):
        return ServiceSettings(listen="x", **flags).tracing_endpoint

    assert endpoint() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:4317")
    assert endpoint() == "http://a:4317"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://b:4317")
    assert endpoint() == "http://b:4317"
    assert endpoint(otlp_endpoint="http://c:4317") == "http://c:4317"
