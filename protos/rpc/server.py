"""A gRPC server with health, reflection, limits and an orderly end.

start()            the port is bound, health says NOT_SERVING, calls are answered UNAVAILABLE
add(service) …     the services exist
set_serving(True)  health says SERVING
drain(seconds)     NOT_SERVING, no new calls, calls in flight finish up to the limit, then the port closes
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from protos.rpc.errors import StartupError, UnavailableError
from protos.rpc.interceptor import Authenticate, Context, ServiceInterceptor
from protos.rpc.process import Shutdown
from protos.rpc.security import PLAINTEXT, Security

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # On a machine that stood still pings arrive together: no reason to drop the connection and its calls.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
REFLECTION_NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
# A cancelled call gets this long to leave: its servicer frees what it holds.
CANCEL_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Service:
    """A servicer, the descriptor of its service, and the generated function that makes handlers of it.

    `background` names methods whose calls last as long as their client does (a registration, a session
    stream): a drain neither refuses nor awaits them.
    """

    descriptor: ServiceDescriptor
    add_to_server: Callable[[Any, Any], None]
    servicer: object
    background: frozenset[str] = frozenset()


class _Handlers(grpc.GenericRpcHandler):
    """The methods of services that may arrive after the server has started.

    Offers the two methods of a server that the generated `add_…_to_server` functions call.
    """

    def __init__(self, declared: Iterable[str]) -> None:
        self._declared = frozenset(declared)
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[object]) -> None:
        """The registered handlers below say the same."""

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        self._methods.update({f"/{service}/{method}": handler for method, handler in handlers.items()})

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._methods.get(details.method)
        if handler is None and details.method.split("/")[1] in self._declared:
            return grpc.unary_unary_rpc_method_handler(_refuse_while_starting)
        return handler


async def _refuse_while_starting(_request: bytes, _context: Context) -> bytes:
    raise UnavailableError("the server is still starting", reason="STARTING", retry_after_seconds=1.0)


class GrpcServer:
    """Serves `services` on `listen`: "host:port", port 0 for a free one, or "unix:/path".

    `authenticate` sees the method and metadata of every call but health and reflection, and raises
    UnauthenticatedError or PermissionDeniedError to refuse it.
    """

    def __init__(
        self,
        listen: str,
        services: Iterable[ServiceDescriptor],
        *,
        security: Security = PLAINTEXT,
        authenticate: Authenticate | None = None,
    ) -> None:
        self.listen = self.address = listen
        self._names = tuple(service.full_name for service in services)
        self._credentials = security.server_credentials
        self._health = HealthServicer()
        self._background: set[str] = set()
        self._interceptor = ServiceInterceptor(self._background, authenticate)
        self._handlers = _Handlers(self._names)
        self._server = grpc.aio.server(
            interceptors=(self._interceptor,), options=OPTIONS, handlers=(self._handlers,)
        )

    @property
    def num_calls(self) -> int:
        """Calls in flight, infrastructure and background methods not counted."""
        return self._interceptor.calls.num_calls

    @property
    def is_draining(self) -> bool:
        """No new calls are let in."""
        return self._interceptor.calls.is_closed

    async def start(self) -> str:
        """Binds, answers health with NOT_SERVING; returns the bound address. StartupError if taken."""
        check_listenable(self.listen)
        await self._add_infrastructure()
        self.address = self._bind()
        await self._server.start()
        return self.address

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """`start`, and whatever happens in the body, `stop`."""
        address = await self.start()
        try:
            yield address
        finally:
            await self.stop()

    def add(self, service: Service) -> None:
        """Makes the service's methods answer."""
        name = service.descriptor.full_name
        self._background.update(f"/{name}/{method}" for method in service.background)
        service.add_to_server(service.servicer, self._handlers)

    async def set_serving(self, is_serving: bool) -> None:
        """What grpc.health.v1 says of "" and of every service."""
        kinds = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, kinds.SERVING if is_serving else kinds.NOT_SERVING)

    async def serve(self, shutdown: Shutdown, *, drain_timeout_seconds: float) -> None:
        """SERVING until the process is asked to end, then a drain. FatalError passes through."""
        await self.set_serving(True)
        shutdown.arm()
        logger.info("ready on %s", self.address)
        try:
            await shutdown.wait()
        finally:
            await self.drain(drain_timeout_seconds)

    async def drain(self, timeout_seconds: float) -> int:
        """Ends in order; the number of calls that had to be cancelled."""
        await self._health.enter_graceful_shutdown()
        num_cancelled = await self._interceptor.calls.close(timeout_seconds)
        if num_cancelled:
            logger.warning(
                "%d calls were not done after %g s and are cancelled", num_cancelled, timeout_seconds
            )
        await self.stop()
        return num_cancelled

    async def stop(self) -> None:
        """Cancels what is in flight and closes the port."""
        await self._server.stop(0)
        await self._server.wait_for_termination(CANCEL_GRACE_SECONDS)

    def _bind(self) -> str:
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self.listen)
            else:
                port = self._server.add_secure_port(self.listen, self._credentials)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self.listen}: {error}") from error
        return self.listen if is_unix(self.listen) else f"{self.listen.rpartition(':')[0]}:{port}"

    async def _add_infrastructure(self) -> None:
        await self.set_serving(False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, *REFLECTION_NAMES)
        servicer = ReflectionServicer(names)
        # v1 and v1alpha differ in nothing but the name.
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        for name in REFLECTION_NAMES:
            self._server.add_registered_method_handlers(name, {"ServerReflectionInfo": handler})


def is_unix(address: str) -> bool:
    return address.startswith("unix:")


def check_listenable(address: str) -> None:
    """Raises StartupError that says why `address` cannot be bound; gRPC would only say that it cannot."""
    if is_unix(address):
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise StartupError(f'cannot listen on {address!r}: not of the form "host:port" or "unix:/path"')
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise StartupError(
                f"cannot listen on {address}: port {port}: {(error.strerror or str(error)).lower()}"
            ) from error
