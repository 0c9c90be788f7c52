"""A tensor-parallel group as one of its ranks sees it: all that ranks tell one another while they compute.

Every rank runs the same steps on its part of the weights. On a CPU the parts of a sum are added in the order
of the ranks, so that the bits of a row do not depend on the rows beside it; on GPUs NCCL adds as it likes.
Shapes: T tokens, D hidden, S rows, N columns of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

# A rank that dies is noticed otherwise; one that still loads its weights is waited for.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Ranks:
    """A rank of a group of `size`; `group` is torch's process group, None where nothing is computed."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, num_units: int) -> range:
        """This rank's units; every rank has as many as another, or one less."""
        return range(num_units * self.rank // self.size, num_units * (self.rank + 1) // self.size)

    def stretch(self, num_units: int) -> range:
        """This rank's units, where the first ranks have equally many and the last ones what is left."""
        width = -(-num_units // self.size)
        return range(min(self.rank * width, num_units), min((self.rank + 1) * width, num_units))

    def sum(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, with the same bits on every rank; may overwrite x."""
        if self.size == 1:
            return x_TD
        if x_TD.is_cuda:
            self.group.allreduce(x_TD).wait()
            return x_TD
        parts = self._gather(x_TD).float()
        total_TD = parts[0]
        for part_TD in parts[1:]:
            total_TD = total_TD + part_TD
        return total_TD.to(x_TD.dtype)

    def join(self, x_SN: torch.Tensor, num_columns: int) -> torch.Tensor:
        """All ranks' columns side by side, [S, num_columns]: each has its `stretch` of them."""
        if self.size == 1:
            return x_SN
        width = -(-num_columns // self.size)
        parts = self._gather(F.pad(x_SN, (0, width - x_SN.shape[1])))
        return parts.transpose(0, 1).reshape(len(x_SN), -1)[:, :num_columns].contiguous()

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of all ranks' values; waits for them."""
        if self.size == 1:
            return value
        held = torch.tensor([value], device=device)
        self.group.allreduce(held, dist.ReduceOp.MIN).wait()
        return int(held)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's x, which overwrites the others'."""
        self.group.broadcast(x, 0).wait()
        return x

    def abort(self) -> None:
        """Frees whoever waits on a GPU for a rank that is gone; gloo notices by itself."""
        if dist.is_nccl_available() and isinstance(self.group, dist.ProcessGroupNCCL):
            self.group.abort()

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, ...]"""
        parts: torch.Tensor = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self.group._allgather_base(parts, x.contiguous()).wait()
        return parts.view(self.size, *x.shape)


ALONE = Ranks()


def join_group(rank: int, size: int, device: torch.device, store: Path) -> Ranks:
    """This process as a rank of a group that meets in the file `store`: NCCL on GPUs, gloo on a CPU."""
    meeting = dist.FileStore(str(store), size)  # type: ignore[attr-defined]
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _PATIENCE
        return Ranks(rank, size, dist.ProcessGroupNCCL(meeting, rank, size, options))
    gloo: Any = dist.ProcessGroupGloo
    local = gloo._Options()
    # Nobody outside this machine may join.
    local._devices = [gloo.create_device(hostname="127.0.0.1")]
    local._timeout = _PATIENCE
    return Ranks(rank, size, gloo(meeting, rank, size, local))
