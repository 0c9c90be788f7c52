"""The scheduler as a process of its own, for several gateways that share workers."""

from __future__ import annotations

import sys

from gateway.scheduler.dispatcher import Dispatcher
from gateway.scheduler.follower import static_workers
from gateway.scheduler.scheduler import Scheduler
from gateway.scheduler.servicer import DESCRIPTOR, scheduler_service
from gateway.scheduler.settings import SchedulerSettings
from protos.rpc.process import Shutdown, run_service
from protos.rpc.server import GrpcServer
from protos.rpc.telemetry import configure_logging
from protos.rpc.tracing import configure_tracing


async def serve(settings: SchedulerSettings, shutdown: Shutdown) -> None:
    configure_tracing("scheduler", settings.tracing_endpoint)
    security = settings.read_security()
    server = GrpcServer(settings.listen, [DESCRIPTOR], security=security)
    address = await server.start()
    dispatcher = Dispatcher(Scheduler(settings.scheduler_config()))
    server.add(scheduler_service(dispatcher))
    async with dispatcher.running(), static_workers(settings.static_worker, dispatcher, security):
        await server.set_serving(True)
        shutdown.arm()
        print(f"ready scheduler on {address}", flush=True)
        try:
            await shutdown.wait()
        finally:
            await server.drain(settings.drain_timeout)


def main() -> None:
    settings = SchedulerSettings.from_command_line(sys.argv[1:])
    configure_logging(settings.log_level, "scheduler", settings.log_format)
    run_service(lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    main()
