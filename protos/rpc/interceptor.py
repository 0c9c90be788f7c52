"""The one wrapper around every RPC: request id, error mapping, access line, count of calls in flight."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
from google.rpc import status_pb2

from protos.rpc.errors import InternalError, ServiceError, UnavailableError
from protos.rpc.telemetry import REQUEST_ID_KEY, bind_request_id, request_id_from
from protos.rpc.tracing import server_span

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Authenticate = Callable[[str, dict[str, str | bytes]], None]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behavior = Callable[[Any, Context], Any]

# Health, reflection and the like answer whatever the state of the service is.
INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.")
DETAILS_KEY = "grpc-status-details-bin"


def draining() -> ServiceError:
    message = "the server is draining and takes no new requests"
    return UnavailableError(message, reason="DRAINING", retry_after_seconds=1.0)


class CallsInFlight:
    """Counts calls; knows when there are none, and refuses new ones once closed."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def stay(self, method: str, metadata: Mapping[str, str | bytes]) -> Iterator[None]:
        """The time of one call inside: counted and traced."""
        service, _, name = method[1:].partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self._counted(), server_span(method[1:], metadata, attributes):
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.is_closed:
            raise draining()
        self.num_calls += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.num_calls -= 1
            if self.num_calls == 0:
                self._empty.set()

    async def close(self, timeout_seconds: float) -> int:
        """Lets no call in, waits for those inside; the number that were not done in time."""
        self.is_closed = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_seconds)
        return self.num_calls


# Those of the server that the current call came in at: a call that carries others counts them itself.
current_calls: ContextVar[CallsInFlight] = ContextVar("calls in flight")


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method but the infrastructure's. `background` names the methods ("/package.Service/Method")
    whose calls last as long as their client does: a drain neither refuses nor awaits them.
    """

    def __init__(self, background: set[str], authenticate: Authenticate | None = None) -> None:
        self.calls = CallsInFlight()
        self._background = background
        self._authenticate = authenticate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(INFRASTRUCTURE):
            return handler
        if handler.response_streaming:
            return self._wrap_stream(method, handler)
        return self._wrap_unary(method, handler)

    def _wrap_unary(self, method: str, handler: Handler) -> Handler:
        behavior: Behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary  # type: ignore[assignment]

        async def call(request: Any, context: Context) -> Any:
            async with self._guard(method, context):
                return await behavior(request, context)

        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(call, handler.request_deserializer, handler.response_serializer)

    def _wrap_stream(self, method: str, handler: Handler) -> Handler:
        behavior: Behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream  # type: ignore[assignment]

        async def call(request: Any, context: Context) -> None:
            # Writing, instead of yielding to gRPC, closes the servicer's generator the moment the call ends.
            async with self._guard(method, context), aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    await context.write(response)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(call, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def _guard(self, method: str, context: Context) -> AsyncIterator[None]:
        metadata = dict(context.invocation_metadata() or ())
        request_id = request_id_from(metadata.items())
        bind_request_id(request_id)
        current_calls.set(self.calls)
        started = time.perf_counter()
        outcome = "OK"
        try:
            if self._authenticate is not None:
                self._authenticate(method, metadata)
            with self._stay(method, metadata):
                await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
                yield
        except ServiceError as error:
            outcome = error.code.name
            await _abort(context, error)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            outcome = "ABORTED"
            raise
        except Exception:  # noqa: BLE001 - the one catch of the services
            outcome = "INTERNAL"
            await _abort(context, _hide_failure(method, request_id))
        finally:
            logger.debug("%s %s %.1f ms", method, outcome, (time.perf_counter() - started) * 1e3)

    @contextmanager
    def _stay(self, method: str, metadata: Mapping[str, str | bytes]) -> Iterator[None]:
        """The time of one call: counted and traced, unless it lasts as long as its client."""
        if method in self._background:
            yield
            return
        with self.calls.stay(method, metadata):
            yield


async def outcome_of(method: str, request_id: str, call: Awaitable[None]) -> status_pb2.Status:
    """The status that `call` ends with, for calls that travel inside another and so pass no guard."""
    try:
        await call
    except ServiceError as error:
        return error.to_status()
    except Exception:  # noqa: BLE001 - the guard's catch
        return _hide_failure(method, request_id).to_status()
    return status_pb2.Status()


def _hide_failure(method: str, request_id: str) -> InternalError:
    """Logs the exception being handled; what the caller is told of it."""
    logger.exception("%s failed", method)
    return InternalError(f"internal error; the server's log has it under request id {request_id}")


async def _abort(context: Context, error: ServiceError) -> None:
    status = error.to_status()
    await context.abort(error.code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
