"""The engine: `add` a request, `abort` one, `step` them all. Synchronous, one thread, no wire.

step:  Scheduler.schedule() -> BatchBuilder.build() -> ModelRunner.run() -> Sampler.draw() -> Sampler.read()

With overlap a step is read when the next one has been launched, which takes the tokens from where they were
drawn; what a sequence that has ended meanwhile was given then is dropped:

    host     schedule, launch 1 | schedule, launch 2 | read 1 | schedule, launch 3 | read 2
    device                      | step 1 .................... | step 2 ..................... | step 3
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from gpu_worker.config import EngineConfig
from gpu_worker.engine.admission import check_request, longest_total
from gpu_worker.engine.batch_builder import BatchBuilder
from gpu_worker.engine.block_ages import BlockAges
from gpu_worker.engine.block_manager import BlockManager
from gpu_worker.engine.errors import RequestError
from gpu_worker.engine.grammars import Constraint, Grammars
from gpu_worker.engine.logprobs import PromptScorer
from gpu_worker.engine.runner import Graphs, Model, ModelRunner
from gpu_worker.engine.sampler import Drawn, Sampler, Samples
from gpu_worker.engine.scheduler import ScheduledStep, Scheduler
from gpu_worker.engine.sequence import FinishReason, Request, Sequence, StepOutput, Timings
from gpu_worker.engine.sequence_table import Rows, SequenceTable
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.sampling_params import SamplingParams

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of this moment, and totals since the start (`*_total`)."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_pending_prefill_tokens: int
    num_steps_total: int
    num_prompt_tokens_total: int
    num_generation_tokens_total: int
    num_preemptions_total: int
    num_prefix_lookup_tokens_total: int
    num_prefix_hit_tokens_total: int
    num_tokens_total: int
    num_steps_by_tokens: tuple[int, ...]  # STEP_TOKENS[i - 1] < tokens <= STEP_TOKENS[i]
    block_ages: BlockAges


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that the device has been given, and how long its sampled sequences are with their new tokens."""

    drawn: Drawn
    sequences: list[Sequence]
    lengths: Rows

    def alive(self) -> Rows:
        """Positions of the sequences that have not ended since."""
        return np.flatnonzero([sequence.row is not None for sequence in self.sequences])


class Engine:
    """Continuous batching over a paged KV cache."""

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        kv_cache: KVCache,
        graphs: Graphs | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits, cache = config.scheduler, config.cache
        self.config = config
        self._clock = clock
        self._blocks = BlockManager(cache.num_blocks, cache.block_size)
        self._table = SequenceTable(limits.max_num_seqs, limits.max_model_len, cache.block_size)
        share = cache.enable_prefix_caching
        self._scheduler = Scheduler(limits, self._blocks, self._table, share_prefixes=share)
        self._batches = BatchBuilder(self._table, config.device)
        self._kv_cache = kv_cache
        self._runner = ModelRunner(model, kv_cache, graphs)
        self._scorer = PromptScorer(self._table, model.logits)
        self._grammars = grammars
        self._sampler = Sampler(
            self._table, limits.max_num_seqs, config.model.vocab_size, config.device, grammars
        )
        self._random = np.random.default_rng(config.seed)
        self._live: dict[str, list[Sequence]] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._outputs: list[StepOutput] = []
        self._flight: _Flight | None = None
        self._num_requests = self._num_tokens = self._num_prompt_tokens = self._num_generation_tokens = 0
        self._num_steps_by_tokens = np.zeros(len(STEP_TOKENS) + 1, np.int64)

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._outputs)

    def is_live(self, request_id: str) -> bool:
        """Whether a sequence of this request has not ended."""
        return request_id in self._live

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError or ContextLengthError if it can never run."""
        check_request(request, self.config)
        if request.request_id in self._live:
            raise RequestError(
                "request_id", f"{request.request_id!r} is in use by a request that has not ended"
            )
        self._live[request.request_id] = sequences = self._make_sequences(request)
        self._scheduler.add(sequences[0])
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, self._num_requests, request))

    def compile(self, params: SamplingParams) -> Constraint | None:
        """The constraint of structured output, or None. Slow the first time; any thread may call it.

        Raises RequestError if the form cannot be followed.
        """
        if params.structured_output is None:
            return None
        if self._grammars is None:
            raise RequestError("structured_output", "needs the model's tokenizer, which is not loaded")
        return self._grammars.compile(params.structured_output)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Ends a request, or only its completion of that index once that has begun; False if there is none.

        Its blocks are free on return; its last output comes with the next step.
        """
        return self._end(request_id, "aborted", index=index)

    @torch.inference_mode()
    def step(self, meanwhile: Callable[[], None] = _nothing) -> list[StepOutput]:
        """Computes one step and tells what it gave to whom; `meanwhile` runs once the device has its work."""
        self._expire()
        if not self._can_run_ahead():
            self._land()
        step = self._scheduler.schedule()
        for sequence in step.admitted:
            self._take_up(sequence)
        launched = self._launch(step) if len(step.rows) else None
        meanwhile()
        self._land()
        self._flight = launched
        if not self.config.overlap:
            self._land()
        return self.take_outputs()

    def take_outputs(self) -> list[StepOutput]:
        """Outputs that no step has told of yet: those of aborted requests."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._table),
            num_waiting=self._scheduler.num_waiting,
            num_used_blocks=self._blocks.num_used,
            num_blocks=self._blocks.num_blocks,
            num_pending_prefill_tokens=self._scheduler.num_pending_prefill_tokens,
            num_steps_total=int(self._num_steps_by_tokens.sum()),
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generation_tokens_total=self._num_generation_tokens,
            num_preemptions_total=self._scheduler.num_preemptions,
            num_prefix_lookup_tokens_total=self._scheduler.num_lookup_tokens,
            num_prefix_hit_tokens_total=self._scheduler.num_hit_tokens,
            num_tokens_total=self._num_tokens,
            num_steps_by_tokens=tuple(self._num_steps_by_tokens.tolist()),
            block_ages=self._blocks.ages,
        )

    def check_integrity(self) -> None:
        """Asserts that nothing has leaked; for tests, and for a moment of idleness."""
        self._scheduler.check_integrity()
        running = set(map(id, self._table.sequences))
        live = {id(sequence) for sequences in self._live.values() for sequence in sequences}
        assert running <= live
        assert self._live or not self._blocks.num_used

    def _make_sequences(self, request: Request) -> list[Sequence]:
        """The `n` sequences of a request. All but the first wait until its prompt is in the KV cache."""
        self._num_requests += 1
        params = request.params
        seed = int(self._random.integers(2**63)) if params.seed is None else params.seed
        arrival = request.arrival_time + request.priority * self.config.scheduler.priority_seconds
        eos = () if params.ignore_eos else self.config.model.eos_token_ids
        sequences = [
            Sequence(
                request=request,
                index=index,
                order=(arrival, self._num_requests, index),
                seed=(seed + index) % 2**64,
                max_total_tokens=longest_total(request, self.config),
                stop_ids=(*eos, *params.stop_token_ids),
                token_ids=np.array(request.prompt_token_ids, np.int32),
                constraint=self.compile(params),
            )
            for index in range(params.n)
        ]
        for sibling in sequences[1:]:
            sibling.first = sequences[0]
        return sequences

    def _take_up(self, sequence: Sequence) -> None:
        self._sampler.attach(sequence)
        self._scorer.add(sequence)
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = self._clock()
            if sequence.index == 0:
                self._num_prompt_tokens += sequence.num_prompt_tokens

    def _can_run_ahead(self) -> bool:
        """Whether the next step can be planned without the tokens of the one that the device is at."""
        return self._scheduler.can_grow and not self._sampler.needs_tokens(self._table.rows)

    def _launch(self, step: ScheduledStep) -> _Flight:
        """Gives the device all of a step, to the drawing of tokens."""
        if step.copies:
            self._kv_cache.copy_blocks(step.copies)
        rows = step.sampled_rows
        batch = self._batches.build(step, self._flight.drawn if self._flight else None)
        sampled = None if step.is_sampled.all() else torch.from_numpy(np.flatnonzero(step.is_sampled))
        self._sampler.prepare(rows)
        stretches = self._scorer.find(step)
        read_hidden = partial(self._scorer.score, stretches) if stretches else None
        self._num_tokens += step.num_tokens
        self._num_steps_by_tokens[bisect_left(STEP_TOKENS, step.num_tokens)] += 1
        drawn = self._sampler.draw(self._runner.run(batch, sampled, read_hidden), rows)
        self._scheduler.commit(step)
        return _Flight(
            drawn, [self._table.sequence(row) for row in rows.tolist()], self._table.num_tokens[rows]
        )

    def _land(self) -> None:
        """Waits for the step that the device is at, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        alive, samples = flight.alive(), self._sampler.read(flight.drawn)
        self._collect(
            flight.drawn.rows[alive],
            [flight.sequences[i] for i in alive.tolist()],
            flight.lengths[alive],
            samples if len(alive) == len(flight.sequences) else samples.of(alive),
        )

    def _collect(self, rows: Rows, sequences: list[Sequence], lengths: Rows, samples: Samples) -> None:
        """Takes a step's tokens into the table, and ends the sequences that they end."""
        table = self._table
        self._scheduler.reveal(rows, lengths, samples.token_ids)
        counts = lengths - table.num_prompt_tokens[rows]
        outputs = list(map(_output, sequences, samples.token_ids.tolist(), counts.tolist()))
        for position, logprobs in samples.logprobs.items():
            outputs[position].logprobs = [logprobs]
        for position in np.flatnonzero(counts == 1).tolist():
            self._begin(sequences[position], outputs[position])
        is_stop = table.hits_stop(rows, samples.token_ids)
        is_end = is_stop | samples.is_complete
        for position in np.flatnonzero(is_end | (lengths >= table.max_total_tokens[rows])).tolist():
            if is_stop[position]:
                outputs[position].stop_token_id = int(samples.token_ids[position])
            if position not in samples.errors:
                self._remove(sequences[position], outputs[position], "stop" if is_end[position] else "length")
        for position, error in samples.errors.items():
            self._fail(sequences[position], outputs[position], error)
        self._num_generation_tokens += len(outputs)
        self._outputs += outputs

    def _begin(self, sequence: Sequence, output: StepOutput) -> None:
        """Notes the first token; the prompt's blocks are known now, for the other completions to share."""
        sequence.first_token_time = self._clock()
        if sequence.index == 0:
            output.prompt_logprobs = sequence.prompt_logprobs or None
            for sibling in self._live[sequence.request.request_id][1:]:
                self._scheduler.add(sibling)

    def _fail(self, sequence: Sequence, output: StepOutput, error: str) -> None:
        """Ends a poisoned request, and it alone; what it wrote to the KV cache is not to be found again."""
        if sequence.row is None:  # a sibling has ended the whole request in this very step
            return
        blocks = self._table.blocks_of(sequence.row)
        self._blocks.forget(blocks)
        self._kv_cache.clear_blocks(self._blocks.own(blocks))
        output.token_ids, output.logprobs, output.stop_token_id = [], None, None
        output.num_completion_tokens -= 1
        output.error = error
        self._remove(sequence, output, "error")
        self._end(sequence.request.request_id, "error", output.error)

    def _end(
        self, request_id: str, reason: FinishReason, error: str | None = None, index: int | None = None
    ) -> bool:
        sequences = [s for s in self._live.get(request_id, ()) if index is None or _has_begun(s, index)]
        for sequence in sequences:
            output = _output(sequence, None, self._num_completion_tokens(sequence))
            output.error = error
            self._remove(sequence, output, reason)
            self._outputs.append(output)
        return bool(sequences)

    def _remove(self, sequence: Sequence, output: StepOutput, reason: FinishReason) -> None:
        """Frees all that a sequence holds and completes its last output."""
        output.finish_reason = reason
        output.timings = self._timings(sequence)
        self._scheduler.remove(sequence)
        request_id = sequence.request.request_id
        self._live[request_id].remove(sequence)
        if not self._live[request_id]:
            del self._live[request_id]

    def _num_completion_tokens(self, sequence: Sequence) -> int:
        row = sequence.row
        table = self._table
        total = sequence.num_tokens if row is None else int(table.num_tokens[row] - table.num_unknown[row])
        return total - sequence.num_prompt_tokens

    def _timings(self, sequence: Sequence) -> Timings:
        now = self._clock()
        arrival = sequence.request.arrival_time
        scheduled = sequence.first_scheduled_time or now
        first = sequence.first_token_time or now
        return Timings(scheduled - arrival, max(0.0, first - scheduled), now - first)

    def _expire(self) -> None:
        """Ends the requests whose deadline has passed, waiting or running."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            request = heapq.heappop(self._deadlines)[-1]
            live = self._live.get(request.request_id)
            if live and live[0].request is request:
                self._end(request.request_id, "aborted", "the deadline passed")


def _has_begun(sequence: Sequence, index: int) -> bool:
    return sequence.index == index and sequence.first_token_time is not None


def _output(sequence: Sequence, token_id: int | None, num_completion_tokens: int) -> StepOutput:
    request = sequence.request
    return StepOutput(
        request.request_id,
        sequence.index,
        [] if token_id is None else [token_id],
        sequence.num_prompt_tokens,
        num_completion_tokens,
        sequence.num_cached_tokens,
    )
