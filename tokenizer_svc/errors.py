"""What can be wrong with a tokenizer's files and with what it is asked."""

from __future__ import annotations


class TokenizerLoadError(ValueError):
    """A folder that holds no usable tokenizer; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class InputError(ValueError):
    """A request that cannot be answered; `field` is the dotted path of the part that is to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
