"""What the engine asks of a library of grammars, for structured output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.sampling_params import StructuredOutput


class Constraint(Protocol):
    """What one completion may still become."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why the text can be followed no further, or None."""
        ...

    def advance(self, token_id: int) -> bool:
        """Takes the completion's next token; False if it is complete now, or has an error."""
        ...


class Grammars(Protocol):
    """Makes constraints and their masks. Safe to use from several threads."""

    def compile(self, wanted: StructuredOutput) -> Constraint:
        """A constraint before its first token. Raises RequestError if there is no such form of text."""
        ...

    def fill(self, constraints: Sequence[Constraint], masks_XW: NDArray[np.int32]) -> None:
        """A row for each constraint: bit v % 32 of word v // 32 says whether token v may come next."""
        ...
