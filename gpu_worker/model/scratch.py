"""Weights apart from the scratch of their making, so that all of the scratch can be given back.

torch gives a GPU's memory back in whole segments only. In one pool what is kept is cut from what an earlier
piece of scratch has left, and the rest of that segment stays:

    one pool     ▓ kept, 462 MiB ▓ 434 MiB │                     in every layer of experts
    two pools    scratch, given back │     ▓ a copy, in a segment of its own ▓
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from cuda_kernels.packing import PackedWint2
from cuda_kernels.tiled import TiledWeight

W = TypeVar("W", PackedWint2, TiledWeight)


def apart(make: Callable[[], W]) -> W:
    """What `make` makes, copied out of the pool of memory that it had while it worked."""
    if not torch.cuda.is_available():
        return make()
    scratch = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(scratch):
        made = make()
    torch.cuda.empty_cache()  # what anyone else has left would be cut up by the copies
    copied = _copied(made)
    del made, scratch
    return copied


def _copied(weight: W) -> W:
    values = ((field.name, getattr(weight, field.name)) for field in fields(weight))
    copies: dict[str, Any] = {name: v.clone() for name, v in values if isinstance(v, torch.Tensor)}
    return replace(weight, **copies)
