"""How many threads a compiled search gets: torch's, but one where waking another costs more than it does."""

import numba
import torch

_LEAST_WORK = 1 << 22  # distances


def use_threads(num_distances: int) -> None:
    """Set the number for the numba calls of this thread."""
    many = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(many if num_distances >= _LEAST_WORK else 1)
