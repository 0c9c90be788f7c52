"""What this gateway knows of the services behind it: whether it can serve, which models, and why not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from gateway.clients import SchedulerClient, TokenizerClient, WorkerClient
from protos.rpc.channel import watch_health
from protos.rpc.errors import ServiceError
from protos.wint2.gateway.v1.gateway_pb2 import Model
from protos.wint2.scheduler.v1.scheduler_pb2 import Worker

POLL_SECONDS = 0.25

OnChange = Callable[[bool], Awaitable[None]]


class Readiness:
    """Kept true by `watching`; read by health checks, the list of models, and the metrics."""

    def __init__(
        self,
        tokenizer: TokenizerClient,
        scheduler: SchedulerClient,
        workers: WorkerClient,
        on_change: OnChange,
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._worker_client = workers
        self._on_change = on_change
        self._was_ready = False
        self._first_seen: dict[str, float] = {}
        self._scheduler_problem: str | None = None
        self._is_tokenizer_serving = False
        self.is_draining = False
        self.workers: list[Worker] = []

    @property
    def reasons(self) -> list[str]:
        """Why requests cannot be served now; empty if they can."""
        reasons = ["draining: no new requests are taken"] if self.is_draining else []
        if not self._is_tokenizer_serving:
            reasons.append("the tokenizer is not serving")
        if self._scheduler_problem is not None:
            reasons.append(self._scheduler_problem)
        elif not self.workers:
            reasons.append("no worker is registered")
        elif not any(worker.load.is_serving for worker in self.workers):
            reasons.append(f"none of the {len(self.workers)} registered workers is serving")
        return reasons

    def models(self) -> list[Model]:
        """The models that can be asked for now."""
        models: dict[str, Model] = {}
        for worker in self.workers:
            offer = worker.registration
            model = models.setdefault(offer.model, Model(id=offer.model, quantization=offer.quantization))
            model.num_workers += 1
            model.max_model_len = max(model.max_model_len, offer.max_model_len)
            model.created.FromSeconds(int(self._first_seen.setdefault(offer.model, time.time())))
        return list(models.values())

    async def start_draining(self) -> None:
        self.is_draining = True
        await self._announce()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Follows the tokenizer's health and the scheduler's workers while this is open."""
        tasks = {asyncio.create_task(self._watch_tokenizer()), asyncio.create_task(self._watch_workers())}
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _watch_tokenizer(self) -> None:
        async for is_serving in watch_health(self._tokenizer.channel):
            self._is_tokenizer_serving = is_serving
            if is_serving:
                self._tokenizer.prepare()
            else:
                self._tokenizer.forget()
            await self._announce()

    async def _watch_workers(self) -> None:
        while True:
            await self._poll_workers()
            await self._announce()
            await asyncio.sleep(POLL_SECONDS)

    async def _poll_workers(self) -> None:
        try:
            self.workers = await self._scheduler.list_workers()
            self._scheduler_problem = None
        except ServiceError as error:
            self.workers, self._scheduler_problem = [], f"the scheduler cannot be asked: {error.message}"
        self.models()
        await self._worker_client.retain({worker.registration.address for worker in self.workers})

    async def _announce(self) -> None:
        is_ready = not self.reasons
        if is_ready != self._was_ready:
            self._was_ready = is_ready
            await self._on_change(is_ready)
