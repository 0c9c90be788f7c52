"""A complete service as its `__main__` would be, for the tests of the process's life."""

from __future__ import annotations

import sys

from pydantic import Field

from protos.rpc.errors import FatalError
from protos.rpc.process import Shutdown, run_service
from protos.rpc.server import GrpcServer
from protos.rpc.settings import ServiceSettings, StringList, service_config
from protos.rpc.telemetry import configure_logging
from tests.fakes import TOKENIZER, WORKER, FakeTokenizer, FakeWorker, tokenizer_service, worker_service


class EchoSettings(ServiceSettings):
    """Sends every prompt back."""

    model_config = service_config("tests.protos.echo_service", "WINT2_ECHO_")

    delay: float = Field(0.0, ge=0, description="seconds between two tokens")
    peer: StringList = Field((), description="some address; may be repeated")
    fatal: bool = Field(False, description="fail once ready")


async def main(settings: EchoSettings, shutdown: Shutdown) -> None:
    configure_logging(settings.log_level, "echo", settings.log_format)
    server = GrpcServer(settings.listen, [WORKER, TOKENIZER])
    await server.start()
    server.add(worker_service(FakeWorker(delay_seconds=settings.delay)))
    server.add(tokenizer_service(FakeTokenizer()))
    if settings.fatal:
        shutdown.request("the device is lost")
    await server.serve(shutdown, drain_timeout_seconds=settings.drain_timeout)


if __name__ == "__main__":
    settings = EchoSettings.from_command_line(sys.argv[1:])
    run_service(lambda shutdown: main(settings, shutdown), expected=(FatalError,) if settings.peer else ())
