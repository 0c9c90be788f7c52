"""The other ranks of a tensor-parallel group: processes that do what rank 0 does, call by call.

    rank 0, the engine          a pipe to each rank             rank 1, 2, ...
    forward(batch)        ────  "forward", sizes  ────►     forward(batch)
                          ════  the group: tensors, sums  ════
Pipes wake whom they reach and carry what the host knows; what is on the device stays there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from gpu_worker.engine.errors import RankError
from gpu_worker.engine.runner import Graphs, Model
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.layers.ranks import Ranks, join_group

_NEWS_SECONDS = 5.0  # a lost connection is seen before the end of the process at its other end
_END_SECONDS = 10.0


class Followers:
    """Ranks 1 to `size - 1`, each a process that was given `task`; `failure` says which of them has ended.

    `close` them at the end. Raises RankError if one ends before it is ready.
    """

    def __init__(self, size: int, device: torch.device, task: object) -> None:
        self.failure: str | None = None
        self._news = Event()
        self._is_closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="wint2-ranks-")
        store = Path(self._folder.name) / "store"
        started = [_start() for _ in range(1, size)]
        self._processes, self._pipes = [process for process, _ in started], [pipe for _, pipe in started]
        for rank, pipe in enumerate(self._pipes, start=1):
            pipe.send((rank, size, store, task))
        for rank, pipe in enumerate(self._pipes, start=1):
            self._expect_ready(rank, pipe)
        self.ranks: Ranks = join_group(0, size, device, store)
        for rank in range(1, size):
            Thread(target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True).start()

    @contextmanager
    def told(self, call: str, known: object = None, tensor: torch.Tensor | None = None) -> Iterator[None]:
        """Has every rank make the body's call too, with what the host knows and a tensor of rank 0's."""
        with self.explained():
            for pipe in self._pipes:
                pipe.send((call, known))
            if tensor is not None:
                self.ranks.broadcast(tensor)
            yield

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the body that comes from the end of a rank is raised as RankError."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self._news.wait(_NEWS_SECONDS)
            if self.failure is None:
                raise
            raise RankError(self.failure) from error

    def close(self) -> None:
        """Ends the processes."""
        self._is_closing = True
        for pipe in self._pipes:
            try:
                pipe.send(("end", None))
            except OSError:
                continue
        for process in self._processes:
            _wait(process)
        self._folder.cleanup()

    def _expect_ready(self, rank: int, pipe: Connection) -> None:
        try:
            pipe.recv()
        except EOFError as error:
            self.failure = self._epitaph(rank, None)
            self.close()
            raise RankError(self.failure) from error

    def _watch(self, rank: int) -> None:
        """Waits for the end of a rank, and frees rank 0 from waiting for it."""
        try:
            message = self._pipes[rank - 1].recv()
        except (EOFError, OSError):
            message = None
        if not self._is_closing:
            self.failure = self.failure or self._epitaph(rank, message)
            self._news.set()
            self.ranks.abort()

    def _epitaph(self, rank: int, message: str | None) -> str:
        code = self._processes[rank - 1].wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} of {len(self._processes) + 1} {how}{f': {message}' if message else ''}"


class LeadModel:
    """The model as rank 0's engine sees it: every rank computes it."""

    def __init__(self, model: Model, followers: Followers) -> None:
        self._model = model
        self._told = followers.told

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        with self._told("forward", sizes_of(batch), pack(batch)):
            return self._model.forward(batch, kv_cache)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        hidden_SD = hidden_SD.contiguous()
        with self._told("logits", (hidden_SD.shape, hidden_SD.dtype), hidden_SD):
            return self._model.logits(hidden_SD)


class LeadGraphs:
    """CUDA graphs of decode steps, which every rank replays."""

    def __init__(self, graphs: Graphs, followers: Followers) -> None:
        self._graphs = graphs
        self._told = followers.told

    def can_run(self, batch: Batch) -> bool:
        return self._graphs.can_run(batch)

    def run(self, batch: Batch) -> torch.Tensor:
        with self._told("replay", sizes_of(batch), pack(batch)):
            return self._graphs.run(batch)


class LeadCache(KVCache):
    """Rank 0's KV cache: what happens to its blocks happens to those of every rank."""

    def __init__(self, cache: KVCache, followers: Followers) -> None:
        self.__dict__.update(vars(cache))
        self._told = followers.told

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        with self._told("copy_blocks", pairs):
            super().copy_blocks(pairs)

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        with self._told("clear_blocks", blocks):
            super().clear_blocks(blocks)


# The tensors of a batch, and their dtypes.
_FIELDS = {
    "input_ids_T": torch.int64,
    "positions_T": torch.int64,
    "slot_mapping_T": torch.int64,
    "block_tables_SM": torch.int32,
    "cu_seqlens_q": torch.int32,
    "context_lens_S": torch.int32,
    "sample_rows_S": torch.int64,
}
Sizes = tuple[list[torch.Size], int]


def sizes_of(batch: Batch) -> Sizes:
    """What the host knows of a batch: the tensors' shapes, and the longest query."""
    return [getattr(batch, name).shape for name in _FIELDS], batch.max_query_len


def pack(batch: Batch) -> torch.Tensor:
    """All tensors of a batch as one, int64."""
    return torch.cat([getattr(batch, name).flatten().long() for name in _FIELDS])


def unpack(sizes: Sizes, receive: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Batch:
    """The batch of these sizes whose packed tensor is received."""
    shapes, max_query_len = sizes
    counts = [shape.numel() for shape in shapes]
    parts = receive(torch.empty(sum(counts), dtype=torch.int64, device=device)).split(counts)
    tensors: dict[str, Any] = {
        name: part.view(shape).to(dtype)
        for (name, dtype), part, shape in zip(_FIELDS.items(), parts, shapes, strict=True)
    }
    return Batch(max_query_len=max_query_len, **tensors)


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "gpu_worker.engine.follower", str(theirs.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
    theirs.close()
    return process, ours


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
