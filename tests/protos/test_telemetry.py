"""Log lines, request ids and the metrics port."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import urllib.request

import prometheus_client
import pytest

from protos.rpc import telemetry
from protos.rpc.errors import StartupError


def record(message="hello %s", *args, exc_info=None):
    return logging.LogRecord("wint2.test", logging.INFO, __file__, 1, message, args, exc_info)


@pytest.fixture
def request_id():
    telemetry.bind_request_id("r-1")
    yield "r-1"
    telemetry.bind_request_id("")


def test_a_text_line_reads_well():
    line = telemetry.TextFormatter("gateway").format(record("hello %s", "you"))
    assert line[8:] == " gateway   INFO    hello you"


def test_the_request_id_is_in_the_line_and_in_calls(request_id):
    assert telemetry.TextFormatter("gateway").format(record("hi")).endswith("hi [r-1]")
    assert json.loads(telemetry.JsonFormatter("gateway").format(record("hi")))["request_id"] == request_id
    assert telemetry.outgoing_metadata() == (("x-request-id", request_id),)


def test_a_json_line_is_one_object_with_the_traceback_inside():
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        line = telemetry.JsonFormatter("worker").format(record("broken", exc_info=sys.exc_info()))
    fields = json.loads(line)
    assert (fields["service"], fields["level"], fields["message"]) == ("worker", "info", "broken")
    assert "by zero" in fields["exception"]
    assert "\n" not in line


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc", "abc"), ("a\r\nset-cookie: x", "aset-cookie: x"), ("ü1", "1"), ("x" * 999, "x" * 128)],
)
def test_foreign_request_ids_are_made_harmless(sent, kept):
    assert telemetry.request_id_from([("other", "no"), ("x-request-id", sent)]) == kept


def test_missing_request_ids_are_new():
    assert telemetry.request_id_from([]) != telemetry.request_id_from([])
    assert len(telemetry.request_id_from([("x-request-id", "\n")])) == 32


def test_metrics_are_served_on_their_port_and_it_is_given_back():
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("steps", "Steps.", registry=registry).inc(3)
    server = telemetry.start_metrics_server(0, registry, host="127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
        assert b"steps_total 3.0" in response.read()
    with pytest.raises(StartupError, match=f"127.0.0.1:{server.port} for /metrics: .*in use"):
        telemetry.start_metrics_server(server.port, registry, host="127.0.0.1")
    server.close()
    socket.create_server(("127.0.0.1", server.port)).close()


@pytest.mark.parametrize(
    ("name", "error", "is_told"),
    [
        ("grpc._cython.cygrpc", asyncio.CancelledError(), False),
        ("grpc._cython.cygrpc", ValueError(), True),
        ("gateway.http", asyncio.CancelledError(), True),
    ],
)
def test_a_call_that_a_stopping_server_cancels_is_no_fault(name, error, is_told):
    told = record(exc_info=(type(error), error, None))
    told.name = name
    assert telemetry.is_worth_telling(told) is is_told
