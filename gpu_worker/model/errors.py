"""What can be wrong with a model folder."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """config.json lacks a key or has a value that this decoder cannot run; `key` names the first such key."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class CheckpointError(ValueError):
    """The weight files are damaged, incomplete or do not fit the config; `problems` holds all of it."""

    # More lines than this help nobody: a wrong config makes one problem a tensor.
    MAX_LINES = 20

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = self.problems[: self.MAX_LINES]
        hidden = len(self.problems) - len(shown)
        lines = [*shown, f"... and {hidden} more"] if hidden else list(shown)
        super().__init__("\n".join(lines))
