"""Compiled functions in Numba's cache, where none outlives a change of this folder.

Numba itself looks at a function's own file alone, and what was compiled into it from another would go stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher

_F = TypeVar("_F", bound=Callable[..., Any])


class _FolderCache(FunctionCache):
    def _index_key(self, *what: Any) -> Any:
        return super()._index_key(*what), _digest()  # type: ignore[no-untyped-call]


class _CachedCFunc(CFunc):
    def enable_caching(self) -> None:
        self._cache = _FolderCache(self.__wrapped__)  # type: ignore[no-untyped-call]


@cache
def _digest() -> str:
    """Of all sources of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def compiled(function: _F, **options: Any) -> Dispatcher[_F]:
    """The function compiled at its first call, or read from the cache; the interpreter's lock is let go."""
    dispatcher: Dispatcher[_F] = numba.njit(nogil=True, **options)(function)
    dispatcher._cache = _FolderCache(function)  # type: ignore[attr-defined, no-untyped-call]
    return dispatcher


def callback(signature: Any, function: Callable[..., Any]) -> CFunc:
    """The function compiled now, or read from the cache, with an address for compiled code to call."""
    made = _CachedCFunc(function, (signature.args, signature.return_type), locals={}, options={})
    made.enable_caching()
    made.compile()
    return made
