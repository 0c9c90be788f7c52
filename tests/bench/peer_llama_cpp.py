"""llama.cpp's side of bench_cpu.py, run by an environment of its own that has llama-cpp-python.

    python peer_llama_cpp.py quantize F16.gguf OUT.gguf TYPE
    python peer_llama_cpp.py bench MODEL.gguf THREADS TOKENS        one JSON line of tokens per second

It calls llama.cpp itself (llama_decode, greedy by the largest logit), without the Python class around it, and
decodes concurrent requests as one batch of sequences, which that class cannot.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp as llama
import numpy as np

# The time of one thread is that of its core, whatever else the machine does; several threads take wall time.
ONE_THREAD = sys.argv[1] == "bench" and sys.argv[3] == "1"
clock = time.process_time if ONE_THREAD else time.perf_counter
SEQUENCES = 16
PROMPT, PREFILL = 32, 512


def quantize(source: str, target: str, type_name: str) -> None:
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.nthread = 2
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama_model_quantize failed for {type_name}")


class Session:
    """A model, a context of `num_sequences`, and batches of (token, position, sequence)."""

    def __init__(self, path: str, num_threads: int, num_sequences: int) -> None:
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024 * num_sequences, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = num_sequences, num_threads, num_threads
        self.context = llama.llama_init_from_model(self.model, params)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(2048, 0, num_sequences)

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int]], wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in wanted
        if llama.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")

    def best(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def decode_rate(session: Session, num_sequences: int, num_tokens: int) -> float:
    session.clear()
    tokens = []
    for sequence in range(num_sequences):
        prompt = [(1000 + 7 * i + sequence, i, sequence) for i in range(PROMPT)]
        session.decode(prompt, {PROMPT - 1})
        tokens.append(session.best(PROMPT - 1))
    start = clock()
    for step in range(num_tokens):
        rows = [(token, PROMPT + step, sequence) for sequence, token in enumerate(tokens)]
        session.decode(rows, set(range(num_sequences)))
        tokens = [session.best(row) for row in range(num_sequences)]
    return num_sequences * num_tokens / (clock() - start)


def prefill_rate(session: Session) -> float:
    session.clear()
    start = clock()
    session.decode([(1000 + 7 * i, i, 0) for i in range(PREFILL)], {PREFILL - 1})
    session.best(PREFILL - 1)
    return PREFILL / (clock() - start)


def bench(path: str, num_threads: int, num_tokens: int) -> None:
    one, many = Session(path, num_threads, 1), Session(path, num_threads, SEQUENCES)
    decode_rate(one, 1, 4)
    rates = {
        "decode 1": decode_rate(one, 1, num_tokens),
        f"decode {SEQUENCES}": decode_rate(many, SEQUENCES, num_tokens // 2),
        f"prefill {PREFILL}": prefill_rate(one),
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:5])
    else:
        bench(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
