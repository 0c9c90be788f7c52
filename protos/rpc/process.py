"""A service's process: wrong input is one line and exit code 2, signals drain, the exit code tells."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

from protos.rpc.errors import FatalError, StartupError

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


class Shutdown:
    """SIGTERM and SIGINT: before `arm` there is nothing to finish, so one ends the process; after it the
    first asks for a drain and the second ends the process at once.
    """

    def __init__(self) -> None:
        self._requested = asyncio.Event()
        self._failure: str | None = None
        self._is_armed = False

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def arm(self) -> None:
        """From here on requests may be in flight."""
        self._is_armed = True

    def request(self, failure: str | None = None) -> None:
        """Asks the service to end; with `failure` the process exits non-zero and says why."""
        self._failure = self._failure or failure
        self._requested.set()

    @property
    def is_requested(self) -> bool:
        return self._requested.is_set()

    async def wait(self) -> None:
        """Returns when the service shall end; raises FatalError if it must."""
        await self._requested.wait()
        if self._failure is not None:
            raise FatalError(self._failure)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._is_armed or self.is_requested:
            logger.info("%s: ending at once", number.name)
            logging.shutdown()
            os._exit(128 + number)
        logger.info("%s: draining; once more ends at once", number.name)
        self.request()


def run_service(
    main: Callable[[Shutdown], Awaitable[None]],
    *,
    expected: tuple[type[Exception], ...] = (),
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> NoReturn:
    """Runs `main` to its end and exits: 0 after a clean end, 2 with one line for a StartupError or one of
    `expected`, 1 with one line for a FatalError.
    """

    async def body() -> None:
        shutdown = Shutdown()
        shutdown.install()
        await main(shutdown)

    wrong_input: tuple[type[Exception], ...] = (StartupError, *expected)
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(body())
    except wrong_input as error:
        fail(str(error), EXIT_WRONG_INPUT)
    except FatalError as error:
        fail(str(error), EXIT_FAILED)
    sys.exit(0)


def fail(message: str, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """One line on standard error, and the end. Threads that still load or compute are not waited for."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
