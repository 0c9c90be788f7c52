"""The HTTP application: which handler answers which URL, and the OpenAPI document that says so."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gateway import responses
from gateway.api_keys import ApiKeys
from gateway.edge import Edge
from gateway.http import OpenAiApi, require_json
from gateway.http_errors import on_http_error, on_service_error, on_validation_error
from gateway.metrics import GatewayMetrics
from gateway.settings import GatewaySettings
from gateway.tokenize import Text, TokenizeApi, Tokens
from protos.rpc.errors import ServiceError

Documented = dict[int | str, dict[str, Any]]

ERRORS: Documented = {
    400: {"model": responses.ErrorBody, "description": "Not JSON, or a field is missing, unknown or wrong"},
    401: {"model": responses.ErrorBody, "description": "No API key, or a wrong one"},
    404: {"model": responses.ErrorBody, "description": "No such model"},
    413: {"model": responses.ErrorBody, "description": "The body is too large"},
    415: {"model": responses.ErrorBody, "description": "The body is not JSON"},
    429: {
        "model": responses.ErrorBody,
        "description": "Too many requests; Retry-After says when to come back",
    },
    500: {"model": responses.ErrorBody, "description": "A fault of the server"},
    503: {"model": responses.ErrorBody, "description": "No worker now; Retry-After says when to come back"},
    504: {"model": responses.ErrorBody, "description": "The request's time was up"},
}


def build_app(
    routers: Iterable[APIRouter], metrics: GatewayMetrics, keys: ApiKeys, settings: GatewaySettings
) -> ASGIApp:
    """Everything between the socket and the handlers."""
    app = FastAPI(
        title="wint2",
        version=version("wint2"),
        summary="OpenAI-compatible API of a server for 2-bit Mixture-of-Experts models",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # the edge tells it already
    )
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Edge(app, metrics, keys, settings.max_body_bytes)


def openai_routes(api: OpenAiApi) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])
    chat = streamable(responses.ChatCompletion, responses.ChatCompletionChunk)
    add_post(routes, "/v1/chat/completions", api.chat_completions, chat)
    text = streamable(responses.TextCompletion, responses.TextCompletion)
    add_post(routes, "/v1/completions", api.completions, text)
    add_get(routes, "/v1/models", api.models, responses.ModelList, 401)
    add_get(routes, "/v1/models/{model:path}", api.model, responses.ModelBody, 401, 404)
    return routes


def tokenize_routes(api: TokenizeApi) -> APIRouter:
    routes = APIRouter(tags=["tokenizer"])
    add_post(routes, "/tokenize", api.tokenize, {200: {"model": Tokens}})
    add_post(routes, "/detokenize", api.detokenize, {200: {"model": Text}})
    return routes


def state_routes(api: OpenAiApi) -> APIRouter:
    routes = APIRouter(tags=["state"])
    not_ready: Documented = {503: {"model": responses.Health, "description": "Not ready, and why"}}
    for path in ("/health", "/health/ready"):
        routes.add_api_route(
            path, api.ready, responses={200: {"model": responses.Health}, **not_ready}, response_model=None
        )
    add_get(routes, "/health/live", api.live, responses.Liveness)
    add_get(routes, "/version", api.version, responses.Version)
    routes.add_api_route(
        "/metrics",
        api.metrics,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_model=None,
    )
    return routes


def add_post(routes: APIRouter, path: str, handler: Any, success: Documented) -> None:
    routes.add_api_route(
        path,
        handler,
        methods=["POST"],
        dependencies=[Depends(require_json)],
        responses=success | ERRORS,
        response_model=None,
    )


def add_get(routes: APIRouter, path: str, handler: Any, model: Any, *errors: int) -> None:
    documented: Documented = {200: {"model": model}, **{status: ERRORS[status] for status in errors}}
    routes.add_api_route(path, handler, methods=["GET"], responses=documented, response_model=None)


def streamable(answer: Any, chunk: Any) -> Documented:
    """200 is the answer, or with `stream` its chunks as server-sent events."""
    description = f"The answer; with `stream`, events of {chunk.__name__}, then `[DONE]`"
    events = {"schema": {"type": "string"}}
    return {200: {"model": answer, "description": description, "content": {"text/event-stream": events}}}


def document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document without its 422, which this server never answers."""
    schema = FastAPI.openapi(app)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema
