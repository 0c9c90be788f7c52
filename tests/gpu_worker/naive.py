"""The simplest driver of a decoder: a step at a time, over a cache where sequences share no block."""

import itertools

import torch

from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache

BLOCK_SIZE = 16


class NaiveRunner:
    """Runs chunks of several sequences through a decoder; blocks are handed out round robin, not in order."""

    def __init__(self, decoder, num_sequences, max_len, dtype=torch.float32):
        config = decoder.config
        per_sequence = -(-max_len // BLOCK_SIZE)
        self.decoder = decoder
        self.tables = torch.arange(per_sequence * num_sequences, dtype=torch.int32).view(-1, num_sequences).T
        self.lens = [0] * num_sequences
        self.cache = KVCache(
            config.num_hidden_layers,
            per_sequence * num_sequences,
            BLOCK_SIZE,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
            torch.device("cpu"),
        )

    def step(self, chunks):
        """chunks: {sequence: new token ids}. Returns {sequence: logits [T, V] of all its new tokens}."""
        sequences = list(chunks)
        lens = [len(chunks[s]) for s in sequences]
        positions = [
            torch.arange(self.lens[s], self.lens[s] + n) for s, n in zip(sequences, lens, strict=True)
        ]
        slots = [
            self.tables[s][p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE
            for s, p in zip(sequences, positions, strict=True)
        ]
        for s, n in zip(sequences, lens, strict=True):
            self.lens[s] += n
        ends = list(itertools.accumulate(lens))
        batch = Batch(
            torch.tensor([token for s in sequences for token in chunks[s]]),
            torch.cat(positions),
            torch.cat(slots),
            self.tables[sequences].contiguous(),
            torch.tensor([0, *ends], dtype=torch.int32),
            torch.tensor([self.lens[s] for s in sequences], dtype=torch.int32),
            max(lens),
            torch.tensor(ends) - 1,
        )
        logits = self.decoder.logits(self.decoder.forward(batch, self.cache))
        return dict(zip(sequences, logits.split(lens), strict=True))


def greedy(decoder, prompt, num_tokens, dtype=torch.float32):
    """The completion of a prompt, token by token."""
    runner = NaiveRunner(decoder, 1, len(prompt) + num_tokens, dtype)
    logits = runner.step({0: prompt})[0]
    completion = [int(logits[-1].argmax())]
    while len(completion) < num_tokens:
        completion.append(int(runner.step({0: completion[-1:]})[0][-1].argmax()))
    return completion
