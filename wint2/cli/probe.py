"""`wint2 probe`: a service's health as an exit code, for containers and for scripts that wait."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.error
import urllib.request
from typing import Annotated

import typer

from protos.rpc.errors import ServiceError
from wint2.cli.run_typer import run_typer
from wint2.clients import wait_until_serving
from wint2.errors import EXIT_FAILED, CommandError

TRY_SECONDS = 2.0
PAUSE_SECONDS = 0.2


def probe(
    address: Annotated[str, typer.Argument(help='"host:port" or "unix:/path" for gRPC, or an http:// URL')],
    service: Annotated[str, typer.Option(help="gRPC service to ask about; all of them by default")] = "",
    wait: Annotated[float, typer.Option(help="seconds to go on asking until it is healthy")] = 0.0,
    while_pid: Annotated[int, typer.Option(help="stop waiting when this process is gone")] = 0,
) -> None:
    """Exit with 0 if a service is healthy, with 1 and the reason if it is not."""
    deadline = time.monotonic() + wait
    while reason := _ask(address, service):
        if time.monotonic() >= deadline:
            raise CommandError(f"{address}: {reason}", EXIT_FAILED)
        if while_pid and not _is_alive(while_pid):
            raise CommandError(f"{address}: {reason}, and process {while_pid} has ended", EXIT_FAILED)
        time.sleep(PAUSE_SECONDS)


def _ask(address: str, service: str) -> str:
    """Why the service is not healthy; empty if it is."""
    try:
        if address.startswith(("http://", "https://")):
            urllib.request.urlopen(address, timeout=TRY_SECONDS).close()
        else:
            asyncio.run(wait_until_serving(address, TRY_SECONDS, service))
    except urllib.error.HTTPError as error:
        with error:
            return f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
    except (OSError, ServiceError) as error:
        return str(error)
    return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(arguments: list[str]) -> None:
    run_typer(probe, arguments)
