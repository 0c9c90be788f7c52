"""Several processes that serve one HTTP port: the kernel deals connections out among them.

The first is a gateway like any other: it has the gRPC API, and workers register with it. The others follow
its list of workers. All count in one set of metrics. When one ends, all end.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NoReturn

from gateway.http_server import bind
from gateway.settings import GatewaySettings, share_metrics
from protos.rpc.errors import StartupError
from protos.rpc.process import EXIT_FAILED, EXIT_WRONG_INPUT, Shutdown, fail

Run = Callable[[GatewaySettings, "Share"], None]


@dataclass(frozen=True)
class Share:
    """A process's part. `follow` is the gRPC address of the first one; `metrics` a folder for all."""

    metrics: Path
    follow: str | None = None


def supervise(settings: GatewaySettings, run: Run) -> NoReturn:
    """Runs `settings.workers` processes of `run` until a signal or until one of them ends; then exits."""
    try:
        reserved = reserve(settings)
    except StartupError as error:
        fail(str(error), EXIT_WRONG_INPUT)
    with reserved, tempfile.TemporaryDirectory(prefix="wint2-gateway-") as name:
        folder = Path(name)
        share_metrics(folder)
        settings = settings.model_copy(update={"http_port": reserved.getsockname()[1]})
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=run, args=part, name=f"gateway-{index}")
            for index, part in enumerate(parts(settings, folder))
        ]
        for process in processes:
            process.start()
        sys.exit(asyncio.run(Watch(processes).run()))


def reserve(settings: GatewaySettings) -> socket.socket:
    """A socket that keeps the HTTP port while no process listens on it yet."""
    if settings.listen.endswith(":0"):
        raise StartupError("--workers needs a --listen address with a port: the processes meet there")
    return bind(settings.http_host, settings.http_port, is_shared=True, is_listening=False)


def parts(settings: GatewaySettings, folder: Path) -> Sequence[tuple[GatewaySettings, Share]]:
    """What each process is started with."""
    followed = None if settings.scheduler else settings.listen
    others = [
        settings.model_copy(update={"listen": f"unix:{folder}/{index}.sock", "metrics_port": None})
        for index in range(1, settings.workers)
    ]
    return [(settings, Share(folder)), *((other, Share(folder, followed)) for other in others)]


class Watch:
    """Passes signals on, and waits for all processes to end."""

    def __init__(self, processes: Sequence[SpawnProcess]) -> None:
        self._processes = processes
        self._num_signals = 0

    async def run(self) -> int:
        """The exit code: that of a process that says why it ends, else failure unless a signal asked."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        for process in self._processes:
            loop.add_reader(process.sentinel, ended.set)
        await ended.wait()
        for process in self._processes:
            loop.remove_reader(process.sentinel)
        if not self._num_signals:
            self._stop()
        while any(process.is_alive() for process in self._processes):
            await asyncio.sleep(0.05)
        codes = [process.exitcode or 0 for process in self._processes]
        return max([0 if self._num_signals else EXIT_FAILED, *codes])

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._stop()

    def _stop(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()


@contextlib.contextmanager
def parent_watched(shutdown: Shutdown) -> Iterator[None]:
    """Ends this process when the one that started it is gone."""
    parent, loop = multiprocessing.parent_process(), asyncio.get_running_loop()
    if parent is not None:
        loop.add_reader(parent.sentinel, shutdown.request)
    try:
        yield
    finally:
        if parent is not None:
            loop.remove_reader(parent.sentinel)
