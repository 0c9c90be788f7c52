"""Who may call: bearer tokens, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from gateway.quotas import current_client
from protos.rpc.errors import UnauthenticatedError


class ApiKeys:
    """Fixed keys and those of a file, which is read again whenever it changes. None at all: everybody may."""

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None) -> None:
        self._fixed = frozenset(map(digest, keys))
        self._path = path
        self._version: tuple[int, int] | None = None
        self._from_file: frozenset[bytes] = frozenset()

    def check(self, authorization: str | None) -> None:
        """Makes the key's owner the current client.

        Raises UnauthenticatedError unless `authorization` is "Bearer KEY" with a known key.
        """
        self._reload()
        known = self._fixed | self._from_file
        if not known and self._path is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        offered = digest(key.strip())
        matches = [hmac.compare_digest(offered, one) for one in known]
        if scheme.lower() != "bearer" or not any(matches):
            what = "Incorrect API key provided." if authorization else "No API key provided."
            raise UnauthenticatedError(f"{what} Send it as 'Authorization: Bearer KEY'.")
        current_client.set(offered.hex())

    def _reload(self) -> None:
        """A file that cannot be read keeps the keys that it had."""
        if self._path is None:
            return
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_size) != self._version:
                lines = self._path.read_text().splitlines()
                self._from_file = frozenset(
                    digest(line.strip()) for line in lines if line.strip() and not line.startswith("#")
                )
                self._version = stat.st_mtime_ns, stat.st_size
        except OSError:
            return


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
