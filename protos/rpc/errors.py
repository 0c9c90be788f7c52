"""The errors of the services, and their one mapping to gRPC status with details and back.

ServiceError
  x InvalidArgumentError      400  the request is wrong; `field` and `limit` say where
      + ContextLengthError    400  prompt and completion do not fit the model's context
  x UnauthenticatedError      401
  x PermissionDeniedError     403
  x NotFoundError             404  no such model, method or request
  x OverloadedError           429  a queue or rate limit is full; `retry_after_seconds` says when to come back
  x CancelledError            499  the caller went away
  x InternalError             500  ours; the message carries no internals
  x UnimplementedError        501  known, and not offered by this server
  x UnavailableError          503  loading, draining, or no worker; `retry_after_seconds`
  x DeadlineError             504  the caller's time is up
"""

from __future__ import annotations

from typing import ClassVar, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "wint2"
MAX_MESSAGE_CHARS = 2000  # a message may quote the request; it never carries megabytes of it back


class StartupError(Exception):
    """The service cannot start as it was asked to: wrong input, said in one line."""


class FatalError(Exception):
    """The service cannot go on, through no fault of its input: the reason, in one line."""


class ServiceError(Exception):
    """An answer that is not a result: what went wrong, in words for the caller.

    `field` is the dotted path of the offending request field, `reason` a stable UPPER_SNAKE word for
    programs, `metadata` the numbers behind the message.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        reason: str | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + "…"
        self.field = field
        self.reason = reason or self.default_reason
        self.metadata = metadata or {}
        self.retry_after_seconds = retry_after_seconds

    def to_status(self) -> status_pb2.Status:
        """This error as google.rpc.Status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
        details: list[
            error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo
        ]
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)]
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after_seconds * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


class InvalidArgumentError(ServiceError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class ContextLengthError(InvalidArgumentError):
    default_reason = "CONTEXT_LENGTH_EXCEEDED"


class UnauthenticatedError(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "INVALID_API_KEY"


class PermissionDeniedError(ServiceError):
    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class NotFoundError(ServiceError):
    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class OverloadedError(ServiceError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class CancelledError(ServiceError):
    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class InternalError(ServiceError):
    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class UnimplementedError(ServiceError):
    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class UnavailableError(ServiceError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineError(ServiceError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


BY_CODE: dict[grpc.StatusCode, type[ServiceError]] = {
    error.code: error
    for error in (
        InvalidArgumentError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        OverloadedError,
        CancelledError,
        InternalError,
        UnimplementedError,
        UnavailableError,
        DeadlineError,
    )
}


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The error another service answered with, as this side's exception; other codes become InternalError."""
    if not isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return UnavailableError(str(error))
    kind = BY_CODE.get(error.code(), InternalError)
    status = rpc_status.from_call(cast(grpc.Call, error))  # an AioRpcError has the methods, not the type
    if status is None:
        return kind(error.details() or error.code().name)
    return from_status(status)


def from_status(status: status_pb2.Status) -> ServiceError:
    """Inverse of `ServiceError.to_status`; unknown details are passed over."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    found: set[str] = set()
    for detail in status.details:
        for target in (info, bad_request, retry):
            if detail.Is(target.DESCRIPTOR):
                detail.Unpack(target)
                found.add(target.DESCRIPTOR.name)
    names = {code.value[0]: code for code in grpc.StatusCode}
    kind = BY_CODE.get(names.get(status.code, grpc.StatusCode.UNKNOWN), InternalError)
    if info.reason == ContextLengthError.default_reason:
        kind = ContextLengthError
    return kind(
        status.message,
        field=bad_request.field_violations[0].field if bad_request.field_violations else None,
        reason=info.reason or None,
        metadata=dict(info.metadata),
        retry_after_seconds=retry.retry_delay.ToNanoseconds() / 1e9 if "RetryInfo" in found else None,
    )
