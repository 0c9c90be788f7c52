"""SchedulerService over a Dispatcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.workers import Worker
from protos.rpc.errors import InvalidArgumentError
from protos.rpc.interceptor import Context
from protos.rpc.server import Service
from protos.wint2.scheduler.v1 import scheduler_pb2 as pb
from protos.wint2.scheduler.v1 import scheduler_pb2_grpc

logger = logging.getLogger(__name__)

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["SchedulerService"]
QUEUED_INTERVAL_SECONDS = 1.0


def scheduler_service(dispatcher: Dispatcher) -> Service:
    """What a GrpcServer hosts; a worker's registration lasts as long as the worker does."""
    return Service(
        DESCRIPTOR,
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
        SchedulerServicer(dispatcher),
        background=frozenset({"RegisterWorker"}),
    )


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def RegisterWorker(
        self, request_iterator: AsyncIterator[pb.RegisterWorkerRequest], context: Context
    ) -> AsyncIterator[pb.RegisterWorkerResponse]:
        worker: Worker | None = None
        try:
            async for request in request_iterator:
                if worker is None:
                    worker = self._register(request)
                    yield pb.RegisterWorkerResponse(worker_id=worker.worker_id)
                elif request.WhichOneof("event") == "load":
                    self._report(worker, request.load)
                else:
                    raise InvalidArgumentError("a worker registers once a stream", field="registration")
        finally:
            if worker is not None:
                logger.info("worker %s left", worker.registration.address)
                self._dispatcher.unregister(worker)

    async def Schedule(
        self, request: pb.ScheduleRequest, context: Context
    ) -> AsyncIterator[pb.ScheduleResponse]:
        place = self._dispatcher.submit(request)
        try:
            while not place.placed.done():
                yield pb.ScheduleResponse(queued=pb.Queued(num_ahead=self._dispatcher.num_ahead(place)))
                await asyncio.wait({place.placed}, timeout=QUEUED_INTERVAL_SECONDS)
            yield pb.ScheduleResponse(placed=await place.wait_placed())
            raise await place.lost
        finally:
            self._dispatcher.withdraw(place)

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(workers=self._dispatcher.list_workers())

    async def GetQueue(self, request: pb.GetQueueRequest, context: Context) -> pb.GetQueueResponse:
        return self._dispatcher.queue()

    def _register(self, request: pb.RegisterWorkerRequest) -> Worker:
        registration = request.registration
        for name in ("instance_id", "address", "model", "max_model_len", "max_num_seqs"):
            if not getattr(registration, name):
                raise InvalidArgumentError(
                    "a registration comes first and says this", field=f"registration.{name}"
                )
        logger.info(
            "worker %s serves %s on %s", registration.address, registration.model, registration.device
        )
        return self._dispatcher.register(registration)

    def _report(self, worker: Worker, load: pb.WorkerLoad) -> None:
        if load.is_serving != worker.load.is_serving:
            state = "takes requests" if load.is_serving else "takes no requests"
            logger.info("worker %s %s", worker.registration.address, state)
        self._dispatcher.report(worker, load)
