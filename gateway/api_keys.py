"""Who may call: bearer tokens, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from gateway.quotas import current_client
from protos.rpc.errors import StartupError, UnauthenticatedError
from protos.rpc.renewal import Renewed


class ApiKeys:
    """Fixed keys and those of a file, which is read again whenever it changes. None at all: everybody may."""

    def __init__(self, keys: Iterable[str] = (), path: Path | None = None) -> None:
        self._fixed = frozenset(map(digest, keys))
        self._file = None if path is None else Renewed([path], partial(read_keys, path))

    def check(self, authorization: str | None) -> None:
        """Makes the key's owner the current client.

        Raises UnauthenticatedError unless `authorization` is "Bearer KEY" with a known key.
        """
        if self._file is None and not self._fixed:
            return
        known = self._fixed if self._file is None else self._fixed | self._file.current()
        scheme, _, key = (authorization or "").partition(" ")
        offered = digest(key.strip())
        matches = [hmac.compare_digest(offered, one) for one in known]
        if scheme.lower() != "bearer" or not any(matches):
            what = "Incorrect API key provided." if authorization else "No API key provided."
            raise UnauthenticatedError(f"{what} Send it as 'Authorization: Bearer KEY'.")
        current_client.set(offered.hex())


def read_keys(path: Path) -> frozenset[bytes]:
    """The digests of a file's keys. StartupError if it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-key-file: cannot read {path}: {error}") from error
    return frozenset(digest(line.strip()) for line in lines if line.strip() and not line.startswith("#"))


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
