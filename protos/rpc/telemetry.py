"""What a service says about itself: one readable log line an event, the request's id in it, and /metrics."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import sys
import uuid
from collections.abc import Iterable
from typing import Literal
from wsgiref.simple_server import WSGIServer

import prometheus_client

from protos.rpc.errors import StartupError
from protos.rpc.tracing import trace_headers

LogFormat = Literal["text", "json"]
REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARS = 128

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the request this task works for; empty outside a request."""
    return _request_id.get()


def bind_request_id(request_id: str) -> None:
    """Makes `request_id` the id of this task's request, in its log lines and in the calls it makes."""
    _request_id.set(request_id)


def request_id_from(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The caller's `x-request-id`, made harmless for logs and headers; a new one if there is none."""
    sent = next((value for key, value in metadata if key == REQUEST_ID_KEY), "")
    kept = "".join(char for char in str(sent)[:MAX_REQUEST_ID_CHARS] if char.isascii() and char.isprintable())
    return kept or uuid.uuid4().hex


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What a call to another service carries on from the current request."""
    request_id = current_request_id()
    ids = ((REQUEST_ID_KEY, request_id),) if request_id else ()
    return (*ids, *trace_headers().items())


class TextFormatter(logging.Formatter):
    """`15:04:05 gateway   INFO    message [request id]`, a traceback below it if there is one."""

    def __init__(self, service: str) -> None:
        super().__init__(
            f"%(asctime)s {service:<9} %(levelname)-7s %(message)s%(request_id)s", datefmt="%H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        request_id = current_request_id()
        record.request_id = f" [{request_id}]" if request_id else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with whatever a record brings as `extra={"fields": {…}}`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": record.created,
            "service": self.service,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id():
            fields["request_id"] = request_id
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def is_worth_telling(record: logging.LogRecord) -> bool:
    """From Python 3.12 on gRPC logs each call that a stopping server cancels as if that were a fault."""
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name.startswith("grpc.") and isinstance(error, asyncio.CancelledError))


def configure_logging(level: str, service: str, log_format: LogFormat = "text") -> None:
    """Sends every log line of the process to standard error in the service's format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if log_format == "json" else TextFormatter(service))
    handler.addFilter(is_worth_telling)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class MetricsServer:
    """GET /metrics in Prometheus' text format, on a thread of its own."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self.port: int = server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def start_metrics_server(
    port: int, registry: prometheus_client.CollectorRegistry, host: str = "0.0.0.0"
) -> MetricsServer:
    """Serves `registry`; port 0 takes a free one. Raises StartupError naming a port that is in use."""
    try:
        server, _thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} for /metrics: {error.strerror or error}"
        ) from error
    return MetricsServer(server)
