"""The outermost layer of the HTTP API: request id, API key, body limit, access line, and the last catch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Access
from gateway.api_keys import ApiKeys
from gateway.http_errors import from_service_error, internal_error
from gateway.metrics import GatewayMetrics
from protos.rpc.errors import UnauthenticatedError
from protos.rpc.telemetry import REQUEST_ID_KEY, bind_request_id, request_id_from
from protos.rpc.tracing import server_span

logger = logging.getLogger(__name__)

# The rest tells nothing of anybody's and must answer probes that have no key.
GUARDED = ("/v1/", "/tokenize", "/detokenize")
QUIET = ("/health", "/metrics", "/status")


class Edge:
    """An ASGI application around the API."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, keys: ApiKeys, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_from(headers.items())
        bind_request_id(request_id)
        reply = _Reply(send, request_id)
        access = scope.setdefault("state", {})["access"] = Access()
        try:
            with traced(scope, headers, reply, access):
                await self._handle(scope, _Limited(receive, self._max_body_bytes), reply, headers)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if reply.status is None:
                await internal_error(request_id).response()(scope, receive, reply)
        finally:
            self._record(scope, reply.status or 499, access)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        if scope["path"].startswith(GUARDED):
            try:
                self._keys.check(headers.get("authorization"))
            except UnauthenticatedError as error:
                await from_service_error(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _record(self, scope: Scope, status: int, access: Access) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "unknown")
        self._metrics.http_requests.labels(path, str(status)).inc()
        if not path.startswith(QUIET):
            access.log(f"{scope['method']} {scope['path']}", str(status))


@contextlib.contextmanager
def traced(scope: Scope, headers: Headers, reply: _Reply, access: Access) -> Iterator[None]:
    """The request's span, with the figures of its access line; probes have none."""
    if not scope["path"].startswith(GUARDED):
        yield
        return
    method, path = scope["method"], scope["path"]
    attributes = {"http.request.method": method, "url.path": path}
    with server_span(f"{method} {path}", headers, attributes) as span:
        yield
        span.set_attribute("http.response.status_code", reply.status or 499)
        span.set_attributes(access.attributes())


class _Reply:
    """`send`, with the request id among the headers; remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID_KEY] = self._request_id
        await self._send(message)


class _Limited:
    """`receive` that ends a body larger than the limit with 413."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._left = max_bytes

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413)
        return message
