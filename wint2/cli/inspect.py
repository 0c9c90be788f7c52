"""`wint2 inspect`: what a checkpoint holds, read off its headers, and whether its checksums hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from gpu_worker.model.checkpoint import Checkpoint, open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import CheckpointError, ConfigError
from gpu_worker.model.k_order import choose_k_order
from gpu_worker.model.plan import ModelPlan, plan_model
from gpu_worker.model.stored_weight import StoredLinear
from gpu_worker.quantizer import checksums
from wint2.cli.quantize import size
from wint2.cli.run_typer import run_typer
from wint2.errors import EXIT_FAILED, CommandError
from wint2.progress import progress_bars


@dataclass
class Part:
    """The weights of one kind and format."""

    layers: set[int] = field(default_factory=set)
    num_weights: int = 0
    num_bytes: int = 0


def inspect(
    directory: Annotated[Path, typer.Argument(help="checkpoint, quantized or not")],
    tensors: Annotated[bool, typer.Option(help="list every tensor")] = False,
    verify: Annotated[bool, typer.Option(help="read every file and compare it with its checksum")] = False,
) -> None:
    """Say what a checkpoint holds: formats by layer, bits per weight, sizes, K order, checksums."""
    try:
        config = read_model_config(directory)
        checkpoint = open_checkpoint(directory)
        plan = plan_model(config, checkpoint)
    except (ConfigError, CheckpointError) as error:
        raise CommandError(str(error)) from error
    count = sum(len(rank) for rank in checkpoint.ranks)
    print(f"layout     {plan.layout.name}, ranks {len(checkpoint.ranks)}, tensors {count}")
    for note in plan.notes:
        print(f"note       {note}")
    print("\n".join(_table(plan)))
    order = choose_k_order(plan, "auto")
    said = f"; config.json says {config.quantization.k_order}" if config.quantization.k_order else ""
    print(f"K order    {order.k_order} ({order.evidence}{said})" if order else "K order    no WINT2 weights")
    for line in _listing(checkpoint) if tensors else ():
        print(line)
    _check_sums(directory, verify)


def _table(plan: ModelPlan) -> Iterator[str]:
    parts = _parts(plan)
    yield f"{'weights':<16}{'format':<10}{'layers':<12}{'parameters':>16}{'bits each':>11}{'size':>12}"
    for (kind, format), part in parts.items():
        name = "bf16/f32" if format == "none" else format
        bits = 8 * part.num_bytes / part.num_weights
        row = f"{kind:<16}{name:<10}{_ranges(part.layers):<12}{part.num_weights:>16,}{bits:>11.3f}"
        yield f"{row}{size(part.num_bytes):>12}"
    weights, stored = (sum(getattr(p, key) for p in parts.values()) for key in ("num_weights", "num_bytes"))
    yield f"{'all':<38}{weights:>16,}{8 * stored / weights:>11.3f}{size(stored):>12}"


def _parts(plan: ModelPlan) -> dict[tuple[str, str], Part]:
    parts: dict[tuple[str, str], Part] = defaultdict(Part)
    for weight in plan.weights():
        part = parts[weight.kind, weight.format]
        words = weight.name.split(".")
        if "layers" in words:
            part.layers.add(int(words[words.index("layers") + 1]))
        part.num_bytes += weight.stored_bytes
        if isinstance(weight, StoredLinear):
            part.num_weights += weight.num_inputs * weight.num_outputs
        else:
            part.num_weights += weight.dense().numel()
    return parts


def _ranges(layers: set[int]) -> str:
    """{0, 1, 2, 5} as "0-2,5"."""
    pieces: list[list[int]] = []
    for layer in sorted(layers):
        if pieces and layer == pieces[-1][-1] + 1:
            pieces[-1][1:] = [layer]
        else:
            pieces.append([layer])
    return ",".join("-".join(map(str, piece)) for piece in pieces)


def _listing(checkpoint: Checkpoint) -> Iterator[str]:
    for rank, found in enumerate(checkpoint.ranks):
        for name, tensor in sorted(found.items()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield f"rank {rank}  {dtype:<9}{list(tensor.shape)!s:<20}{size(tensor.nbytes):>12}  {name}"


def _check_sums(directory: Path, verify: bool) -> None:
    count = len(checksums.read(directory))
    if not count:
        print(f"checksums  none ({checksums.NAME} is missing)")
        return
    if not verify:
        print(f"checksums  {count} files listed in {checksums.NAME}, not compared (--verify does)")
        return
    with progress_bars() as show:
        problems = checksums.verify(directory, lambda done, total: show("verifying", done, total))
    if problems:
        raise CommandError(f"{directory}: " + "; ".join(problems), EXIT_FAILED)
    print(f"checksums  {count} files, all as written")


def main(arguments: list[str]) -> None:
    run_typer(inspect, arguments)
