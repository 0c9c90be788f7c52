"""Typed access to a JSON file's keys; every problem names its key, and all are told at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_worker.model.errors import ConfigError

MAX_BYTES = 1 << 20  # published files have a few thousand

_MISSING = object()
_MAX_SIZE = 2**31 - 1


class Keys:
    """Typed access to a JSON object. What is wrong with a value is kept for `check`; a harmless value is
    returned in its place."""

    def __init__(
        self, values: Mapping[str, Any], path: str = "", problems: list[ConfigError] | None = None
    ) -> None:
        self._values = values
        self._path = path
        self._problems: list[ConfigError] = [] if problems is None else problems
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.value(key) is not None

    def name(self, key: str) -> str:
        return f"{self._path}{key}"

    def size(self, key: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        """An integer of at least `minimum` that could be a tensor's size."""
        value = self._get(key, default, minimum)
        if type(value) is int and minimum <= value <= _MAX_SIZE:
            return value
        self.wrong(key, f"must be an integer from {minimum} to {_MAX_SIZE}, got {value!r}")
        return minimum

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self._get(key, default, 1.0)
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
            return float(value)
        self.wrong(key, f"must be a number above 0, got {value!r}")
        return 1.0

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self._get(key, default, False)
        if type(value) is bool:
            return value
        self.wrong(key, f"must be true or false, got {value!r}")
        return False

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self._get(key, default, "")
        if isinstance(value, str):
            return value
        self.wrong(key, f"must be a string, got {value!r}")
        return ""

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0; empty where the key is absent."""
        value = self._get(key, [], [])
        if isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_SIZE for v in value):
            return tuple(value)
        self.wrong(key, f"must be a list of integers from 0, got {value!r}")
        return ()

    def section(self, key: str) -> Keys:
        """A nested object; empty where the key is absent."""
        value = self._get(key, {}, {})
        if not isinstance(value, dict):
            self.wrong(key, f"must be an object, got {value!r}")
            value = {}
        return Keys(value, f"{self._path}{key}.", self._problems)

    def unread(self) -> list[str]:
        """Names of the keys that nobody asked for."""
        return [self.name(key) for key in self._values if key not in self._asked]

    def wrong(self, key: str, message: str) -> None:
        self._problems.append(self.error(key, message))

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(self.name(key), f"config.json: {self.name(key)} {message[:400]}")

    def check(self) -> None:
        """Raises ConfigError with all that was wrong, if anything was."""
        if self._problems:
            lines = dict.fromkeys(map(str, self._problems))
            raise ConfigError(self._problems[0].key, "\n".join(lines))

    def value(self, key: str) -> Any:
        self._asked.add(key)
        return self._values.get(key)

    def _get(self, key: str, default: Any, harmless: Any) -> Any:
        value = self.value(key)
        if value is None and default is _MISSING:
            self.wrong(key, "is missing")
            return harmless
        return default if value is None else value


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError."""
    try:
        content = json.loads(_read_text(file))
    except FileNotFoundError as error:
        raise ConfigError(file.name, f"{file}: no such file") from error
    except OSError as error:
        raise ConfigError(file.name, f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(file.name, f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(file.name, f"{file}: must be a JSON object")
    return content


def _read_text(file: Path) -> str:
    with file.open(encoding="utf-8") as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ConfigError(file.name, f"{file}: more than {MAX_BYTES} characters")
    return text
