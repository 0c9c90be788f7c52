"""What ends a command with one line on standard error."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


class CommandError(Exception):
    """Wrong input (exit code 2) or a failure (1), in words for the person at the terminal."""

    def __init__(self, message: str, exit_code: int = EXIT_WRONG_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code
