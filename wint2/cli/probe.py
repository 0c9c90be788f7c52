"""`wint2 probe`: a service's health as an exit code, for containers and for scripts that wait."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from protos.rpc.errors import ServiceError, StartupError
from protos.rpc.security import Security, read_security
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
    tls_ca: Annotated[Path | None, typer.Option(help="PEM authority of the service's certificate")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate to show to it")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of --tls-cert")] = None,
) -> None:
    """Exit with 0 if a service is healthy, with 1 and the reason if it is not."""
    deadline = time.monotonic() + wait
    security = _read_security(tls_cert, tls_key, tls_ca)
    while reason := _ask(address, service, security):
        if time.monotonic() >= deadline:
            raise CommandError(f"{address}: {reason}", EXIT_FAILED)
        if while_pid and not _is_alive(while_pid):
            raise CommandError(f"{address}: {reason}, and process {while_pid} has ended", EXIT_FAILED)
        time.sleep(PAUSE_SECONDS)


def _read_security(certificate: Path | None, key: Path | None, authority: Path | None) -> Security:
    try:
        return read_security(certificate, key, authority, is_mutual=False)
    except StartupError as error:
        raise CommandError(str(error)) from error


def _ask(address: str, service: str, security: Security) -> str:
    """Why the service is not healthy; empty if it is."""
    try:
        if address.startswith(("http://", "https://")):
            context = _https(security) if address.startswith("https://") else None
            urllib.request.urlopen(address, timeout=TRY_SECONDS, context=context).close()
        else:
            asyncio.run(wait_until_serving(address, TRY_SECONDS, service, security))
    except urllib.error.HTTPError as error:
        with error:
            return f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
    except (OSError, ServiceError) as error:
        return str(error)
    return ""


def _https(security: Security) -> ssl.SSLContext:
    """The system's authorities, or the one given."""
    authority = security.authority
    return ssl.create_default_context(cadata=None if authority is None else authority.decode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(arguments: list[str]) -> None:
    run_typer(probe, arguments)
