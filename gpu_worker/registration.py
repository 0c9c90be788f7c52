"""Presence at the schedulers: who this worker is, then how it fares, for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable

import grpc

from gpu_worker.health import WorkerHealth
from protos.rpc.channel import open_channel
from protos.rpc.errors import UnavailableError, from_rpc_error
from protos.rpc.security import PLAINTEXT, Security
from protos.wint2.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
UNREACHABLE = UnavailableError.default_reason


class Registrar:
    """Keeps this worker registered with one scheduler; reconnects for ever: either side may start first."""

    def __init__(
        self,
        scheduler: str,
        registration: scheduler_pb2.WorkerRegistration,
        load: Callable[[], scheduler_pb2.WorkerLoad],
        health: WorkerHealth,
        security: Security = PLAINTEXT,
    ) -> None:
        self._scheduler = scheduler
        self._registration = registration
        self._load = load
        self._health = health
        self._security = security
        self._backoff_seconds = FIRST_BACKOFF_SECONDS
        self._is_reported_lost = False

    async def run(self) -> None:
        """Never returns; cancel it to leave the scheduler."""
        async with open_channel(self._scheduler, self._security) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            while True:
                reason = await self._stay(stub)
                self._report_lost(reason)
                await asyncio.sleep(self._backoff_seconds * random.uniform(0.5, 1.0))
                self._backoff_seconds = min(self._backoff_seconds * 2, MAX_BACKOFF_SECONDS)

    async def _stay(self, stub: scheduler_pb2_grpc.SchedulerServiceAsyncStub) -> str:
        """Registers and reports until the stream ends; why it did."""
        call = stub.RegisterWorker(self._events())
        try:
            async for response in call:
                logger.info("registered with scheduler %s as %s", self._scheduler, response.worker_id)
                self._backoff_seconds = FIRST_BACKOFF_SECONDS
                self._is_reported_lost = False
        except grpc.aio.AioRpcError as error:
            answer = from_rpc_error(error)
            return "it cannot be reached" if answer.reason == UNREACHABLE else answer.message
        finally:
            call.cancel()
        return "it ended the registration"

    async def _events(self) -> AsyncIterator[scheduler_pb2.RegisterWorkerRequest]:
        yield scheduler_pb2.RegisterWorkerRequest(registration=self._registration)
        while True:
            yield scheduler_pb2.RegisterWorkerRequest(load=self._load())
            await self._health.wait_changed(REPORT_SECONDS)

    def _report_lost(self, reason: str) -> None:
        if not self._is_reported_lost:
            logger.warning("not registered with scheduler %s: %s; trying on", self._scheduler, reason)
        self._is_reported_lost = True
