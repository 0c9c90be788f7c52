"""What the scheduler knows of one worker: who it is, how it fares, what was placed on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from protos.wint2.scheduler.v1.scheduler_pb2 import ScheduleRequest, WorkerLoad, WorkerRegistration

# What a completion of unknown length is expected to cost; only the balance between workers rests on it.
ASSUMED_COMPLETION_TOKENS = 256


@dataclass(eq=False, slots=True)
class Worker:
    """One registration. `placed` maps request ids to their tokens; `seen_at` is in the caller's seconds."""

    registration: WorkerRegistration
    seen_at: float
    load: WorkerLoad = field(default_factory=WorkerLoad)
    placed: dict[str, int] = field(default_factory=dict)
    num_placed_tokens: int = 0

    @property
    def worker_id(self) -> str:
        return self.registration.instance_id

    @property
    def max_placed(self) -> int:
        """A few more than run at once, so that the next request is there when a sequence ends."""
        return self.registration.max_num_seqs + max(1, self.registration.max_num_seqs // 8)

    @property
    def has_room(self) -> bool:
        return len(self.placed) < self.max_placed

    def fits(self, request: ScheduleRequest) -> bool:
        """Whether prompt and completion (at least one token) fit the worker's context."""
        return request.prompt_tokens + max(request.max_tokens, 1) <= self.registration.max_model_len

    def is_silent(self, now: float, seconds: float) -> bool:
        return now - self.seen_at > seconds

    def place(self, request: ScheduleRequest) -> None:
        tokens = num_tokens(request)
        self.placed[request.request_id] = tokens
        self.num_placed_tokens += tokens

    def release(self, request_id: str) -> None:
        self.num_placed_tokens -= self.placed.pop(request_id)

    def inherit(self, previous: Worker) -> None:
        """Takes over the places of the same process's earlier registration: its requests still run."""
        self.placed, self.num_placed_tokens = previous.placed, previous.num_placed_tokens
        self.load = previous.load

    def attraction(self, affinity_key: int) -> bytes:
        """Rendezvous hash: for one key every worker keeps its rank, whichever other workers come and go."""
        return hashlib.blake2b(f"{affinity_key}|{self.registration.address}".encode(), digest_size=8).digest()


def num_tokens(request: ScheduleRequest) -> int:
    """Tokens that the request will hold at most, as far as it says."""
    return request.prompt_tokens + (request.max_tokens or ASSUMED_COMPLETION_TOKENS)


def choose(request: ScheduleRequest, candidates: list[Worker], affinity_slack_tokens: int) -> Worker:
    """The least loaded candidate, or the one whose prefix cache knows the prompt if it is not much busier."""
    least = min(candidates, key=lambda worker: (worker.num_placed_tokens, len(worker.placed)))
    if not request.HasField("affinity_key"):
        return least
    liked = max(candidates, key=lambda worker: worker.attraction(request.affinity_key))
    is_busier = liked.num_placed_tokens > least.num_placed_tokens + affinity_slack_tokens
    return least if is_busier else liked
