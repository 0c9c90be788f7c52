"""A service's process from outside: flags, help, exit codes, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protos.rpc.channel import open_channel, wait_serving
from protos.wint2.common.v1.common_pb2 import TokenIds
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.protos.echo_service import EchoSettings

COMMAND = [sys.executable, "-m", "tests.protos.echo_service"]
ROOT = Path(__file__).parents[2]


def run(*flags, env=None):
    return subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


@asynccontextmanager
async def running(tmp_path, *flags):
    """The process, once SERVING, and a channel to it."""
    address = f"unix:{tmp_path}/echo.sock"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--listen", address, *flags, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        async with open_channel(address) as channel:
            await wait_serving(channel, timeout_seconds=30)
            yield process, channel
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def generate(channel):
    request = worker_pb2.GenerateRequest(request_id="r", prompt=TokenIds(ids=range(3, 13)))
    return aiter(worker_pb2_grpc.WorkerServiceStub(channel).Generate(request))


def test_help_tells_every_flag_and_default():
    result = run("--help")
    assert result.returncode == 0
    for word in (
        "--listen",
        "--drain-timeout",
        "default: 30.0",
        "--log-format",
        "{text,json}",
        "--fatal",
        "--no-fatal",
    ):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("flags", "env"), [(["--peer", "a", "--peer", "b"], {}), ([], {"WINT2_ECHO_PEER": "a, b"})]
)
def test_a_list_is_a_repeated_flag_or_a_comma_separated_variable(flags, env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert EchoSettings.from_command_line(["--listen", "x:0", *flags]).peer == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ([], {}, "--listen (or WINT2_ECHO_LISTEN): field required"),
        (
            ["--listen", "x:0", "--delay", "soon"],
            {},
            "--delay (or WINT2_ECHO_DELAY): input should be a valid number",
        ),
        (
            ["--listen", "x:0"],
            {"WINT2_ECHO_DELAY": "-1"},
            "--delay (or WINT2_ECHO_DELAY): input should be greater",
        ),
        (["--listen", "x:0", "--dealy", "1"], {}, "unrecognized arguments: --dealy 1"),
        (["--listen", "nowhere"], {}, "cannot listen on 'nowhere'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(flags, env, message):
    result = run(*flags, env=env)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_one_line_and_exit_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("--listen", f"127.0.0.1:{port}")
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        == f"error: cannot listen on 127.0.0.1:{port}: port {port}: address already in use"
    )


def test_a_fatal_error_is_one_line_and_exit_code_1():
    result = run("--listen", "127.0.0.1:0", "--fatal")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: the device is lost"


async def test_sigterm_finishes_what_is_in_flight(tmp_path):
    async with running(tmp_path, "--delay", "0.05") as (process, channel):
        responses = generate(channel)
        await anext(responses)
        process.send_signal(signal.SIGTERM)
        assert [response async for response in responses][-1].HasField("finish")
        _, stderr = await process.communicate()
        assert process.returncode == 0
        assert b"SIGTERM: draining" in stderr


async def test_a_second_signal_ends_at_once(tmp_path):
    async with running(tmp_path, "--delay", "60") as (process, channel):
        await anext(generate(channel))
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            await process.stderr.readuntil(b"draining")
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            await process.wait()
        assert process.returncode == 128 + signal.SIGINT


async def test_the_drain_has_a_limit(tmp_path):
    async with running(tmp_path, "--delay", "60", "--drain-timeout", "0.2") as (process, channel):
        await anext(generate(channel))
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()
        assert process.returncode == 0
