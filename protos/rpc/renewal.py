"""Files that may be replaced while a service runs: certificates, keys."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from protos.rpc.errors import StartupError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Version = tuple[tuple[int, int, int], ...]


class Renewed(Generic[T]):
    """What `make` makes of files, made again when one of them changes. Any thread may ask.

    `make` raises StartupError for files of no use: at first that passes through, later what was there before
    stays in use, and the log says so once.
    """

    def __init__(self, paths: Sequence[Path], make: Callable[[], T]) -> None:
        self._paths = paths
        self._make = make
        self._lock = threading.Lock()
        self._version = version(paths)
        self._value = make()

    def current(self) -> T:
        """What the files hold now."""
        with self._lock:
            found = version(self._paths)
            if found != self._version:
                self._version = found
                self._renew()
            return self._value

    def _renew(self) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._make()
        except StartupError as error:
            logger.warning("%s; what was read before stays in use", error)
        else:
            logger.info("read again: %s", names)


def version(paths: Sequence[Path]) -> Version:
    """Differs when a file was written, replaced or removed."""
    return tuple(map(_version_of, paths))


def _version_of(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
