"""Starts the stack's processes, waits until they serve, watches over them, and ends them all together."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from protos.rpc.security import PLAINTEXT, Security
from protos.rpc.telemetry import configure_logging
from wint2.child import Child
from wint2.clients import ask_worker, wait_until_serving
from wint2.errors import EXIT_FAILED, EXIT_WRONG_INPUT, CommandError
from wint2.preflight import check_model, check_ports, check_security
from wint2.settings import ServeSettings
from wint2.stack import Stack, plan_stack, used_ports

logger = logging.getLogger(__name__)

START_SECONDS = 24 * 3600.0  # hundreds of gigabytes may come over a slow network file system
STOP_SECONDS = 10.0  # beyond the drain timeout, until a child that does not end is killed


def serve(settings: ServeSettings) -> None:
    """Runs the stack until it is told to end. Raises CommandError for wrong input or when a child dies."""
    configure_logging(settings.log_level, "wint2", settings.log_format)
    check_model(settings.model, settings.tokenizer, needs_weights=settings.load_format != "dummy")
    check_ports(settings.host, used_ports(settings))
    security = check_security(settings)
    with tempfile.TemporaryDirectory(prefix="wint2-") as folder:
        stack = plan_stack(settings, Path(folder))
        asyncio.run(Launcher(stack, settings.drain_timeout, security).run())


class Launcher:
    """Owns the children from the first to the last of them."""

    def __init__(self, stack: Stack, drain_seconds: float, security: Security = PLAINTEXT) -> None:
        self._stack = stack
        self._security = security
        self._drain_seconds = drain_seconds
        self._children: list[Child] = []
        self._stop_requested = asyncio.Event()

    async def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        try:
            for service in self._stack.services:
                self._children.append(await Child.start(service))
            if await self._unless_ended(self._announce()):
                await self._unless_ended(self._stop_requested.wait())
        finally:
            await self._stop()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop_requested.is_set():
            logger.info("%s: ending at once", number.name)
            for child in self._children:
                child.send(signal.SIGKILL)
        else:
            logger.info("%s: draining; once more ends at once", number.name)
            self._stop_requested.set()

    async def _unless_ended(self, work: Coroutine[Any, Any, object]) -> bool:
        """Works until it is done (True), a stop is asked for (False), or a child dies (CommandError)."""
        done = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop_requested.wait())
        deaths = [asyncio.create_task(child.wait()) for child in self._children]
        await asyncio.wait([done, stop, *deaths], return_when=asyncio.FIRST_COMPLETED)
        await _cancel(done, stop, *deaths)
        if self._stop_requested.is_set():
            return False
        for child in self._children:
            if child.has_ended:
                is_input = child.exit_code == EXIT_WRONG_INPUT
                raise CommandError(child.epitaph(), EXIT_WRONG_INPUT if is_input else EXIT_FAILED)
        await done
        return True

    async def _announce(self) -> None:
        """Waits until everything serves, and prints what was found."""
        await asyncio.gather(
            *(
                wait_until_serving(service.address, START_SECONDS, security=self._security)
                for service in self._stack.services
            )
        )
        facts = [await ask_worker(worker.address, self._security) for worker in self._stack.workers]
        print("\n" + summarize(self._stack, facts[0].lines()), flush=True)

    async def _stop(self) -> None:
        """The gateway first: it lets its requests finish, which needs the others."""
        gateway = [child for child in self._children if child.service is self._stack.gateway]
        others = [child for child in self._children if child.service is not self._stack.gateway]
        await _end(gateway, self._drain_seconds + STOP_SECONDS)
        await _end(others, STOP_SECONDS)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends the tasks, and waits until they have closed what they hold."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _end(children: Iterable[Child], seconds: float) -> None:
    running = [child for child in children if not child.has_ended]
    for child in running:
        child.send(signal.SIGTERM)
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(child.wait() for child in running))
    except TimeoutError:
        for child in running:
            child.send(signal.SIGKILL)
        await asyncio.gather(*(child.wait() for child in running))


def summarize(stack: Stack, facts: list[tuple[str, str]]) -> str:
    """The lines that the start ends with: what was found, and where it answers."""
    workers = f" x {len(stack.workers)} workers" if len(stack.workers) > 1 else ""
    lines = [
        *((label, text + workers if label == "device" else text) for label, text in facts),
        ("HTTP", f"{stack.http_url}/v1   (health {stack.http_url}/health, metrics {stack.metrics_url})"),
        ("gRPC", f"{stack.grpc_address}   (wint2.gateway.v1, wint2.scheduler.v1, health, reflection)"),
        *(("worker gRPC", worker.address) for worker in stack.workers),
    ]
    return "\n".join(f"  {label:<13} {text}" for label, text in lines) + "\n"
