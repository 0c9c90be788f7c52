"""`python -m gpu_worker.engine.follower FD`: a rank beside the engine's, started by `Followers`."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from gpu_worker.engine.build import EngineArgs, Part, build_part
from gpu_worker.engine.devices import choose_device
from gpu_worker.engine.followers import unpack
from gpu_worker.layers.ranks import join_group
from gpu_worker.model.config_reader import read_model_config


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 may have requests to finish, and says when it is over
    logging.basicConfig(level=logging.ERROR)
    pipe = Connection(int(sys.argv[1]))
    Thread(target=_end_with, args=(pipe.fileno(),), daemon=True).start()
    try:
        _run(pipe, *pipe.recv())
    except (ValueError, RuntimeError, OSError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _run(pipe: Connection, rank: int, size: int, store: Path, args: EngineArgs) -> None:
    choice = choose_device(args.device, rank, size)
    pipe.send("ready")
    ranks = join_group(rank, size, choice.device, store)
    part = build_part(args, read_model_config(args.model), choice, ranks)
    with torch.inference_mode():
        while (message := pipe.recv())[0] != "end":
            _do(part, *message)


def _do(part: Part, call: str, known: Any) -> None:
    """What rank 0 is doing."""
    device, receive = part.config.device, part.ranks.broadcast
    match call:
        case "forward":
            part.model.forward(unpack(known, receive, device), part.kv_cache)
        case "replay" if part.graphs is not None:
            part.graphs.run(unpack(known, receive, device))
        case "logits":
            shape, dtype = known
            part.model.logits(receive(torch.empty(shape, dtype=dtype, device=device)))
        case "copy_blocks":
            part.kv_cache.copy_blocks(known)
        case "clear_blocks":
            part.kv_cache.clear_blocks(known)


def _end_with(pipe: int) -> None:
    """Ends this process when rank 0 has closed its end of the pipe, whatever is being computed."""
    hangup = select.poll()
    hangup.register(pipe, 0)
    hangup.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
