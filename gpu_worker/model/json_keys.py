"""Typed access to a JSON file's keys, with problems that name the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_worker.model.errors import ConfigError

_MISSING = object()
_MAX_SIZE = 2**31 - 1


class Keys:
    """Typed access to a JSON object; problems name the key with its path."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def name(self, key: str) -> str:
        return f"{self._path}{key}"

    def size(self, key: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """An integer of at least `minimum` that could be a tensor's size."""
        value = self._get(key, default)
        if type(value) is not int or not minimum <= value <= _MAX_SIZE:
            raise self.error(key, f"must be an integer from {minimum} to {_MAX_SIZE}, got {value!r}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, f"must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r}")
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0; empty where the key is absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value):
            raise self.error(key, f"must be a list of integers from 0, got {value!r}")
        return tuple(value)

    def section(self, key: str) -> Keys:
        """A nested object; empty where the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, got {value!r}")
        return Keys(value, f"{self._path}{key}.")

    def unknown(self, known: frozenset[str]) -> list[str]:
        return [self.name(key) for key in self._values if key not in known]

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(self.name(key), f"config.json: {self.name(key)} {message}")

    def value(self, key: str) -> Any:
        return self._values.get(key)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None and default is _MISSING:
            raise self.error(key, "is missing")
        return default if value is None else value


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(file.name, f"{file}: no such file") from error
    except OSError as error:
        raise ConfigError(file.name, f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(file.name, f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(file.name, f"{file}: must be a JSON object")
    return content
