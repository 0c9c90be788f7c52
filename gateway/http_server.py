"""Uvicorn as a part of this process: bound at once, drained by whoever owns the signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from protos.rpc.errors import StartupError
from protos.rpc.renewal import Renewed
from protos.rpc.security import check_pair

logger = logging.getLogger(__name__)

BACKLOG = 2048
# What the kernel holds for a client that does not read; its own limit would be megabytes.
SEND_BUFFER_BYTES = 256 << 10


class _Uvicorn(uvicorn.Server):
    """Signals are the process's affair."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves `app` on a listening socket while `running` is open. `port` is the bound one."""

    def __init__(self, app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self._socket = listener
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            backlog=BACKLOG,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
        self._server = _Uvicorn(config)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        serving = asyncio.create_task(self._server.serve([self._socket]))
        try:
            yield self
        finally:
            self._server.should_exit = self._server.force_exit = True
            await serving

    async def drain(self, timeout_seconds: float) -> None:
        """Waits for the requests in flight, but no longer than the timeout."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        while self._server.server_state.tasks and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if left := len(self._server.server_state.tasks):
            logger.warning(
                "%d HTTP requests were not done after %g s and are cancelled", left, timeout_seconds
            )
            for task in list(self._server.server_state.tasks):
                task.cancel()


def bind(host: str, port: int, *, is_shared: bool = False, is_listening: bool = True) -> socket.socket:
    """A socket, `is_shared` among processes that all say so; StartupError names the port that is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        if is_listening:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise StartupError(f"cannot listen on {host}:{port}: port {port}: {reason}") from error
    listener.setblocking(False)
    return listener


def read_http_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The server's side of TLS; each handshake is made with the latest files.

    StartupError if a file is missing or of no use.
    """
    if (certificate is None) != (key is None):
        raise StartupError("--http-tls-cert and --http-tls-key go together: one of them is missing")
    if certificate is None or key is None:
        return None
    contexts = Renewed([certificate, key], partial(check_pair, certificate, key, "--http-tls"))

    def on_hello(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = contexts.current()

    context = contexts.current()
    context.sni_callback = on_hello
    return context
