"""OpenTelemetry traces: the spans of a request's services are one trace, and the caller's if it has one.

Without a collector there are no spans: the caller's context is only passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from protos.rpc.errors import ServiceError, StartupError

Attributes = Mapping[str, str | int | float]

# What OpenTelemetry calls an error on the server's side; the other codes are the caller's affair.
SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
    }
)

tracer = trace.get_tracer("wint2")
_propagator = TraceContextTextMapPropagator()


def configure_tracing(service: str, endpoint: str | None) -> None:
    """Sends this process's spans to an OTLP collector (gRPC, "http://host:4317"), if one is named.

    OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER and the like mean what OpenTelemetry says.
    """
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartupError('--otlp-endpoint needs OpenTelemetry: pip install "wint2[otel]"') from error
    resource = Resource.create({"service.name": f"wint2-{service}", "service.version": version("wint2")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


@contextmanager
def server_span(name: str, headers: Mapping[str, Any], attributes: Attributes) -> Iterator[Span]:
    """The time of a call on this side; the `traceparent` among its headers is the span's parent."""
    parent = _propagator.extract(headers)
    with tracer.start_as_current_span(
        name, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except ServiceError as error:
            if error.code in SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR, error.message))
            span.set_attributes({"error.type": error.code.name, "wint2.error.reason": error.reason})
            raise
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def trace_headers() -> dict[str, str]:
    """`traceparent` and `tracestate` for a call to another service; none outside a trace."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    return headers
