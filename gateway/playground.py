"""GET /: the playground, a page that needs nothing from elsewhere; GET /status: the state that it shows."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from importlib.resources import files
from operator import add
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse, Response
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from gateway.clients import SchedulerClient, WorkerClient
from gateway.readiness import Readiness
from protos.rpc.errors import ServiceError
from protos.wint2.scheduler.v1.scheduler_pb2 import GetQueueResponse, Worker

INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class QueueState(TypedDict):
    waiting: int
    max_waiting: int
    placed: int


class WorkerState(TypedDict):
    model: str
    device: str
    quantization: str
    is_serving: bool
    max_model_len: int
    max_num_seqs: int
    num_running: int
    num_waiting: int
    kv_cache_tokens: int
    kv_cache_usage_ratio: float
    generation_tokens_per_second: float


class LayerExperts(TypedDict):
    layer: int
    tokens: list[int]  # routed to each expert since the worker's start


class Status(TypedDict):
    reasons: list[str]  # why requests cannot be served now; empty if they can
    queue: QueueState
    workers: list[WorkerState]
    experts: list[LayerExperts]  # empty unless workers run with --count-expert-tokens


class Playground:
    """The page's two handlers."""

    def __init__(self, readiness: Readiness, scheduler: SchedulerClient, workers: WorkerClient) -> None:
        self._readiness = readiness
        self._scheduler = scheduler
        self._workers = workers
        page = files("gateway").joinpath("playground.html").read_text(encoding="utf-8")
        headers = {"content-security-policy": content_security_policy(page), "cache-control": "no-cache"}
        self._page = HTMLResponse(page, headers={**headers, "referrer-policy": "no-referrer"})

    async def page(self) -> Response:
        """The playground."""
        return self._page

    async def status(self) -> Response:
        """Queue, load of each worker, and why requests cannot be served if they cannot."""
        workers = [worker_state(worker) for worker in self._readiness.workers]
        status: Status = {
            "reasons": self._readiness.reasons,
            "queue": queue_state(await self._queue()),
            "workers": workers,
            "experts": await self._experts(),
        }
        return JSONResponse(status, headers={"cache-control": "no-store"})

    async def _queue(self) -> GetQueueResponse:
        try:
            return await self._scheduler.queue()
        except ServiceError:
            return GetQueueResponse()  # `reasons` says that the scheduler cannot be asked

    async def _experts(self) -> list[LayerExperts]:
        """The sum over the workers that count; those that do not answer do not hold up the page."""
        serving = [
            worker.registration.address for worker in self._readiness.workers if worker.load.is_serving
        ]
        counts = await asyncio.gather(*map(self._workers.expert_tokens, serving), return_exceptions=True)
        totals: dict[int, list[int]] = {}
        for layers in counts:
            if not isinstance(layers, BaseException):
                for layer in layers:
                    so_far = totals.get(layer.layer, [0] * len(layer.tokens))
                    totals[layer.layer] = list(map(add, so_far, layer.tokens))
        return [{"layer": layer, "tokens": totals[layer]} for layer in sorted(totals)]


def playground_routes(playground: Playground) -> APIRouter:
    routes = APIRouter(tags=["state"])
    page: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
    routes.add_api_route("/", playground.page, methods=["GET"], responses=page, response_class=HTMLResponse)
    routes.add_api_route(
        "/status", playground.status, methods=["GET"], responses={200: {"model": Status}}, response_model=None
    )
    return routes


def queue_state(queue: GetQueueResponse) -> QueueState:
    return {
        "waiting": len(queue.waiting),
        "max_waiting": queue.max_waiting,
        "placed": queue.num_placed,
    }


def worker_state(worker: Worker) -> WorkerState:
    offer, load = worker.registration, worker.load
    return {
        "model": offer.model,
        "device": offer.device,
        "quantization": offer.quantization,
        "is_serving": load.is_serving,
        "max_model_len": offer.max_model_len,
        "max_num_seqs": offer.max_num_seqs,
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "kv_cache_tokens": offer.kv_cache_tokens,
        "kv_cache_usage_ratio": round(load.kv_cache_usage_ratio, 4),
        "generation_tokens_per_second": round(load.generation_tokens_per_second, 1),
    }


def content_security_policy(page: str) -> str:
    """Lets the page's own script run, styles apply and this server be called; nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
