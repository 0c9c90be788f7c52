"""Random numbers without a generator: a hash of the sequence's seed and the token's position.

So a draw knows nothing of the batch, and a preempted or resumed text goes on as it would have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds_S: NDArray[np.uint64], positions_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and position: two rounds of SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = _mix(_mix(seeds_S + _GOLDEN) ^ (positions_S.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 48 bits, so that a product with the total mass always rounds to less than the total.
    return (bits >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
