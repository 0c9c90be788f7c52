"""The caller's side of a connection: channel options, and waiting for a service to be ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Self

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
    return _open(address, security) if security.files is None else RenewingChannel(address, security)


def _open(address: str, security: Security) -> grpc.aio.Channel:
    credentials = security.channel_credentials
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    options = (*OPTIONS, *UNIX_TLS_OPTIONS) if is_unix(address) else OPTIONS
    return grpc.aio.secure_channel(address, credentials, options=options)


class RenewingChannel(grpc.aio.Channel):
    """A channel whose new calls are made with the latest certificates; those that run stay where they are."""

    def __init__(self, address: str, security: Security) -> None:
        self._address = address
        self._security = security
        self._used = security.latest
        self._channels = [_open(address, self._used)]

    @property
    def current(self) -> grpc.aio.Channel:
        latest = self._security.latest
        if latest is not self._used:
            self._used = latest
            self._channels.append(_open(self._address, latest))
        return self._channels[-1]

    async def close(self, grace: float | None = None) -> None:
        for channel in self._channels:
            await channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._method("stream_stream", args, kwargs)

    def _method(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """A stub's method, which finds its channel at each call."""
        made: dict[grpc.aio.Channel, Callable[..., Any]] = {}

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            channel = self.current
            if channel not in made:
                made[channel] = getattr(channel, kind)(*args, **kwargs)
            return made[channel](*call_args, **call_kwargs)

        return call


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
