"""The caller's side of a connection: channel options, and waiting for a service to be ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rpc.errors import UnavailableError
from protos.rpc.security import PLAINTEXT, Security
from protos.rpc.server import MAX_MESSAGE_BYTES, is_unix

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This is how long an attempt may take: a busy peer is slow to greet.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to one address are otherwise one connection, and share its backoff.
    ("grpc.use_local_subchannel_pool", 1),
)
# A socket's path is no name that a certificate could be for.
UNIX_TLS_OPTIONS: tuple[tuple[str, str], ...] = (
    ("grpc.ssl_target_name_override", "localhost"),
    ("grpc.default_authority", "localhost"),
)
REWATCH_SECONDS = 0.1


def open_channel(address: str, security: Security = PLAINTEXT) -> grpc.aio.Channel:
    """A channel to "host:port" or "unix:/path"; it connects on first use and reconnects by itself.

    With TLS, a certificate must be for the host, and behind a unix socket for "localhost".
    """
    credentials = security.channel_credentials
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    options = (*OPTIONS, *UNIX_TLS_OPTIONS) if is_unix(address) else OPTIONS
    return grpc.aio.secure_channel(address, credentials, options=options)


async def watch_health(channel: grpc.aio.Channel, service: str = "") -> AsyncGenerator[bool]:
    """Whether `service` is SERVING: now, and at every change, for ever. A lost connection is a False."""
    last: bool | None = None
    while True:
        async for is_serving in _watch_once(channel, service):
            if is_serving != last:
                last = is_serving
                yield is_serving
        await asyncio.sleep(REWATCH_SECONDS)


async def wait_serving(channel: grpc.aio.Channel, service: str = "", *, timeout_seconds: float) -> None:
    """Returns once `service` is SERVING; UnavailableError if that takes longer than the timeout."""
    try:
        async with asyncio.timeout(timeout_seconds), aclosing(watch_health(channel, service)) as states:
            async for is_serving in states:
                if is_serving:
                    return
    except TimeoutError:
        name = service or "the server"
        raise UnavailableError(f"{name} was not ready after {timeout_seconds:g} s") from None


async def _watch_once(channel: grpc.aio.Channel, service: str) -> AsyncGenerator[bool]:
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
    try:
        async for response in call:
            yield response.status == health_pb2.HealthCheckResponse.SERVING
    except grpc.aio.AioRpcError:
        pass
    finally:
        call.cancel()
    yield False
