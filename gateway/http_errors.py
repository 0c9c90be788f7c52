"""Every error as OpenAI's body and HTTP status; the gateway's table of what went wrong.

400  invalid_value, missing_required_parameter, unknown_parameter, unsupported_parameter,
     context_length_exceeded, invalid_json          (param: the dotted path of the field)
401  invalid_api_key            413  body_too_large              499  the client left
404  model_not_found            415  unsupported_media_type      500  server_error, no internals
404  unknown_url                429  rate_limit_exceeded         503  no_worker, queue_timeout, draining, ...
405  method_not_allowed              + Retry-After               504  deadline_exceeded
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.responses import ErrorBody
from protos.rpc.errors import InternalError, ServiceError

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# OpenAI's words where they differ from our reasons in lower case.
CODES = {"INVALID_ARGUMENT": "invalid_value", "INTERNAL": "server_error"}
VALIDATION_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "json_invalid": "invalid_json",
}
HTTP_CODES = {
    400: ("invalid_json", "the request's body is not JSON"),
    404: ("unknown_url", "Unknown request URL: {method} {path}"),
    405: ("method_not_allowed", "Not allowed to {method} on {path}"),
    413: ("body_too_large", "the request's body is larger than this server takes"),
    415: ("unsupported_media_type", "send the body as JSON, with Content-Type: application/json"),
}


@dataclass(frozen=True)
class HttpError:
    """An error on its way out."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> ErrorBody:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        body = json.dumps(self.body, ensure_ascii=False).encode("utf-8", "replace")
        return Response(body, self.status, self.headers, "application/json")


def from_service_error(error: ServiceError, *, prompt_field: str = "prompt") -> HttpError:
    """`prompt_field` is what the request calls its prompt: the scheduler and the worker do not know."""
    status = STATUS.get(error.code, 500)
    code = "rate_limit_exceeded" if status == 429 else CODES.get(error.reason, error.reason.lower())
    headers = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return HttpError(status, error.message, code, _param(error.field, prompt_field), headers)


@contextlib.contextmanager
def named_as_asked(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of the wire name the request's own field instead."""
    try:
        yield
    except ServiceError as error:
        wire_name = (error.field or "").removeprefix("sampling_params.")
        if wire_name in names:
            error.message = error.message.replace(error.field or wire_name, names[wire_name])
            error.field = names[wire_name]
        raise


def from_validation(errors: Sequence[Mapping[str, Any]]) -> HttpError:
    """The first of pydantic's findings: its field as a dotted path, its message without the input."""
    first = errors[0]
    kind, context = first["type"], first.get("ctx") or {}
    param = _path((*first["loc"], *filter(None, [context.get("param")])))
    code = VALIDATION_CODES.get(kind, "invalid_value")
    message = first["msg"]
    if kind == "missing":
        message = f"Missing required parameter: '{param}'" if param else "the request has no body"
    elif kind == "extra_forbidden":
        message = f"Unknown parameter: '{param}'"
    elif kind == "json_invalid":
        param, message = (
            None,
            f"the request's body is not JSON: {context.get('error', 'it cannot be parsed')}",
        )
    elif param is None:
        message = "the request's body is not a JSON object"
    else:
        message = f"'{param}' {message[:1].lower()}{message[1:]}"
    return HttpError(400, message[:2000], code, param)


def from_http(error: HTTPException, request: Request) -> HttpError:
    code, message = HTTP_CODES.get(error.status_code, ("invalid_request", str(error.detail)))
    message = message.format(method=request.method, path=request.url.path[:200])
    return HttpError(error.status_code, message, code, headers=error.headers or {})


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    prompt_field = "messages" if request.url.path.endswith("/chat/completions") else "prompt"
    return from_service_error(error, prompt_field=prompt_field).response()


async def on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return from_http(error, request).response()


def internal_error(request_id: str) -> HttpError:
    message = f"internal error; the server's log has it under request id {request_id}"
    return from_service_error(InternalError(message))


def _param(field_path: str | None, prompt_field: str) -> str | None:
    if field_path is None:
        return None
    field_path = field_path.removeprefix("sampling_params.")
    return prompt_field if field_path in ("prompt", "prompt_token_ids", "prompt.ids") else field_path


def _path(location: Sequence[int | str]) -> str | None:
    """("body", "messages", 0, "content") is `messages.0.content`."""
    parts = [str(part) for part in location if part != "body"]
    return ".".join(parts)[:200] or None
