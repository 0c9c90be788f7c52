"""What the engine refuses: plain errors that the services and `LLM` turn into their own."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be run as asked; `field` is the parameter at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class ContextLengthError(RequestError):
    """Prompt and completion together do not fit the context or the KV cache."""


class EngineDeadError(RuntimeError):
    """The device failed; no request can run until the process is started again."""


class RankError(RuntimeError):
    """Another rank of the tensor-parallel group has ended, and with it all that the group computes."""


class EngineDrainingError(RuntimeError):
    """The engine finishes what it has and takes nothing new."""


class EngineArgsError(ValueError):
    """An engine that cannot be built as asked; `field` is the argument at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
