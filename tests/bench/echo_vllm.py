"""The echo engine as vLLM's, for others' gateways: a call a request, the tokenizer's files from the engine.

python -m tests.bench.echo_vllm LISTEN MODEL STEP_SECONDS
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import uvloop

from gpu_worker.servicer import WorkerServicer
from gpu_worker.vllm_servicer import vllm_service
from protos.wint2.worker.v1 import worker_pb2
from tests.bench.echo_engine import MODEL, delta, ending, prompt_info
from tests.fakes import FakeWorker, serving


class EchoModel(FakeWorker):
    """Every `step_seconds` a token."""

    def __init__(self, model: Path, step_seconds: float) -> None:
        super().__init__()
        self._model = model
        self._step_seconds = step_seconds

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.GenerateResponse]:
        yield prompt_info(request)
        due = time.monotonic()
        for _ in range(request.sampling_params.max_tokens):
            due += self._step_seconds
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield delta(request, 1)
        yield ending(request)

    async def GetModelInfo(self, request: Any, context: Any) -> worker_pb2.GetModelInfoResponse:
        return worker_pb2.GetModelInfoResponse(
            served_model_name=MODEL, model_path=str(self._model), max_model_len=4096, vocab_size=300
        )


async def run_vllm(listen: str, model: Path, step_seconds: float) -> None:
    engine = cast(WorkerServicer, EchoModel(model, step_seconds))
    async with serving(vllm_service(engine), listen=listen):
        await asyncio.Event().wait()


def main() -> None:
    listen, model, step = sys.argv[1:]
    uvloop.run(run_vllm(listen, Path(model), float(step)))


if __name__ == "__main__":
    main()
