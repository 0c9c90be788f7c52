"""What the gateway costs: an engine that echoes ids at a steady pace, many clients, all on this machine.

python -m tests.bench.bench_gateway [--streams 1024] [--seconds 10] [--pin 0,1] [--smg .peer/bin/smg]

Latency: a token's time at the client minus its time at the engine, over 64 streams at 50 tokens a second; all
tokens of a step at once, as an engine makes them, and each stream at its own time, as many engines do. The
same without the gateway, by gRPC from the engine to a client of the same kind, is what a gateway adds to.
Throughput: requests of 32 tokens in, 64 out from closed-loop clients. --pin gives the gateway cores of its
own and leaves the others to engine, tokenizer and clients. Without, all share the cores, so each one's CPU
time is told: what the gateway's allows on cores of its own follows from it.
With --smg the same text requests go through PyPI's smg, a gateway in Rust, and through this one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.bench.echo_engine import COMPLETION_TOKENS, MAX_STREAMS, MODEL
from tests.bench.stream_clients import PROMPT_TOKENS, Clients
from tests.tiny import make_tiny_model
from tokenizer_svc.tokenizer import load_tokenizer

Command = list[str]
PYTHON = sys.executable
LATENCY_STREAMS = 64
ECHO = [PYTHON, "-m", "tests.bench.echo_engine"]
ECHO_VLLM = [PYTHON, "-m", "tests.bench.echo_vllm"]


@dataclass(frozen=True)
class Cores:
    """`gateway`: the cores that are the gateway's own, as taskset lists them; none: all share all."""

    gateway: str | None = None

    def pin_others(self) -> None:
        """This process, and what it starts, leave the gateway's cores alone."""
        if self.gateway is not None:
            taken = {int(core) for core in self.gateway.split(",")}
            os.sched_setaffinity(0, os.sched_getaffinity(0) - taken)

    def pinned(self, command: Command) -> Command:
        return command if self.gateway is None else ["taskset", "--cpu-list", self.gateway, *command]


@dataclass(frozen=True)
class Load:
    """`phases`: over how many instants the sequences' steps are spread."""

    num_streams: int
    step_seconds: float
    phases: int = 1


def cpu_seconds(processes: list[subprocess.Popen[bytes]]) -> float:
    """User and system time so far of the processes and what they started."""
    ticks = 0
    for pid in (one for process in processes for one in family(process.pid)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


@contextlib.contextmanager
def running(commands: dict[str, Command], port: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The processes by name, once the gateway among them is ready."""
    env = {**os.environ, "GRPC_VERBOSITY": "ERROR"}
    quiet = {"stdout": subprocess.DEVNULL, "env": env}
    processes = {name: subprocess.Popen(command, **quiet) for name, command in commands.items()}  # type: ignore[call-overload]
    try:
        wait_ready(port)
        yield processes
    finally:
        for process in reversed(processes.values()):
            process.terminate()
        for process in processes.values():
            process.wait(20)


def wait_ready(port: int) -> None:
    """Returns when connection after connection meets a process that is ready."""
    deadline, num_ready = time.monotonic() + 60, 0
    while num_ready < 20:
        assert time.monotonic() < deadline, "the gateway is not ready"
        num_ready = num_ready + 1 if is_ready(port) else 0
        time.sleep(0.0 if num_ready else 0.1)


def is_ready(port: int) -> bool:
    """Whether the process that takes a new connection is ready, and offers the engine's model."""
    return get(port, "/health") is not None and f'"{MODEL}"'.encode() in (get(port, "/v1/models") or b"")


def get(port: int, path: str) -> bytes | None:
    """The answer, if it is a 200."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer,
    ):
        return bytes(answer.read())
    return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def our_stack(folder: Path, port: int, workers: int, load: Load, model: Path | None) -> dict[str, Command]:
    """`model`: a directory with a tokenizer for text; without, a byte tokenizer that costs little."""
    tokenizer, gateway = f"unix:{folder}/tokenizer.sock", f"unix:{folder}/gateway.sock"
    flags = ["--http-host", "127.0.0.1", "--http-port", str(port), "--listen", gateway]
    flags += ["--tokenizer", tokenizer, "--log-level", "warning", "--max-waiting", str(MAX_STREAMS)]
    pace = [str(load.step_seconds), str(load.phases), str(folder / "clocks")]
    service = [PYTHON, "-m", "tokenizer_svc", "--model", str(model), "--listen", tokenizer]
    return {
        "tokenizer": [*ECHO, "tokenizer", tokenizer] if model is None else service,
        "gateway": [PYTHON, "-m", "gateway", *flags, "--workers", str(workers)],
        "engine": [*ECHO, "engine", f"unix:{folder}/engine.sock", gateway, *pace],
    }


def smg_stack(smg: str, port: int, load: Load, model: Path) -> dict[str, Command]:
    engine = f"127.0.0.1:{free_port()}"
    addresses = ["--worker-urls", f"grpc://{engine}", "--host", "127.0.0.1", "--port", str(port)]
    limits = ["--max-concurrent-requests", str(MAX_STREAMS), "--prometheus-port", str(free_port())]
    return {
        "engine": [*ECHO_VLLM, engine, str(model), str(load.step_seconds)],
        "gateway": [smg, "launch", *addresses, *limits, "--model-path", str(model), "--log-level", "error"],
    }


def measure(
    title: str, commands: dict[str, Command], clients: Clients, load: Load, seconds: float, engine: str = ""
) -> None:
    """A warm-up, the load, and a few lines; with `engine`, the load without the gateway beside it."""
    with running(commands, clients.port) as processes:
        clients.run(load.num_streams, 1.0)
        before = {name: cpu_seconds([process]) for name, process in processes.items()}
        seen = clients.run(load.num_streams, seconds)
        spent = {name: cpu_seconds([process]) - before[name] for name, process in processes.items()}
        direct = replace(clients, engine=engine).run(load.num_streams, seconds) if engine else None
    print(f"{title}: {load.num_streams} streams, a token each {load.step_seconds * 1e3:g} ms")
    if direct is not None:
        print(f"  engine to client   {in_words(seen.delays)}; without the gateway {in_words(direct.delays)}")
        added = statistics.median(seen.delays) - statistics.median(direct.delays)
        print(f"  added to a token   p50 {added * 1e3:.2f} ms")
    print(f"  first token        p50 {statistics.median(seen.first) * 1e3:.1f} ms after the request")
    print(f"  throughput         {seen.rate:.0f} requests/s, {seen.rate * COMPLETION_TOKENS:.0f} tokens/s")
    spent["clients"] = seen.cpu_seconds
    each = {name: value / seen.num_done * 1e3 for name, value in spent.items()}
    print(f"  CPU a request      {', '.join(f'{name} {value:.2f} ms' for name, value in each.items())}")
    print(f"  a gateway's core   carries {1e3 / each['gateway']:.0f} requests/s", flush=True)


def in_words(delays: list[float]) -> str:
    percentiles = statistics.quantiles(delays, n=100)
    return f"p50 {percentiles[49] * 1e3:.2f} ms, p99 {percentiles[98] * 1e3:.2f} ms"


def measure_ours(title: str, workers: int, load: Load, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clocks, port = Path(folder) / "clocks", free_port()
        commands = our_stack(Path(folder), port, workers, load, None)
        commands["gateway"] = Cores(options.pin).pinned(commands["gateway"])
        clients = Clients(port, clocks, num_processes=options.client_processes)
        engine = ""
        if load.num_streams == LATENCY_STREAMS:
            engine = f"unix:{folder}/engine.sock"
            clients = replace(clients, ramp_seconds=load.step_seconds)
        measure(title, commands, clients, load, options.seconds, engine)


def measure_text(smg: str, load: Load, options: argparse.Namespace) -> None:
    """The same text requests through either gateway."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", quantized=True)
        prompt = prompt_text(model)
        stacks = {
            "this gateway": partial(our_stack, Path(folder), workers=1, model=model),
            "smg": partial(smg_stack, smg, model=model),
        }
        for title, stack in stacks.items():
            port = free_port()
            commands = stack(port=port, load=load)
            commands["gateway"] = Cores(options.pin).pinned(commands["gateway"])
            clients = Clients(port, prompt=prompt, num_processes=options.client_processes)
            measure(f"text, {title}", commands, clients, load, options.seconds)


def prompt_text(model: Path) -> str:
    """Words of PROMPT_TOKENS tokens."""
    tokenizer = load_tokenizer(model)
    text = "a"
    while len(tokenizer.encode(text)) < PROMPT_TOKENS:
        text += " a"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--smg", help="smg's command, for scale")
    parser.add_argument("--pin", metavar="CORES", help="cores for the gateway alone, such as 0,1")
    parser.add_argument("--client-processes", type=int, default=1)
    options = parser.parse_args()
    Cores(options.pin).pin_others()
    for workers in (1, 2):
        measure_ours(
            f"latency, own pace, {workers} process", workers, Load(LATENCY_STREAMS, 0.02, phases=64), options
        )
        measure_ours(f"latency, in step, {workers} process", workers, Load(LATENCY_STREAMS, 0.02), options)
        measure_ours(f"throughput, {workers} process", workers, Load(options.streams, 0.01), options)
    if options.smg:
        measure_text(options.smg, Load(64, 0.01), options)


if __name__ == "__main__":
    main()
