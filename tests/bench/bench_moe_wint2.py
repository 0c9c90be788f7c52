"""The WINT2 expert op against its own limits, torch's bfloat and torch's int4, in one run.

python -m tests.bench.bench_moe_wint2 [--model 300b,21b] [--tokens 1,8,64,4096] [--repeats 9] [--output FILE]
                                      [--ops "wint2,wint2 half"]

A time is that of one call of several in a row, which make up a CUDA graph as layers make up a step: each has
a routing of its own, and its weights are not the ones of the call before, so that L2 holds none of them. The
median over replays, all of L2 overwritten before each. GB/s counts the bytes of the experts that were used,
in the op's own format; "copy" is the rate of a large device-to-device copy in the same run, read and written
bytes counted, and "bf16" that of products of 8192 x 8192 bfloats, eight in a row.
The rows for torch's come sorted for nothing: int4 is torch.ops.aten._weight_int4pack_mm, expert by expert, in
groups of 128; bfloat is torch._grouped_mm. "wint4" is this project's own op for WINT4 experts, "wint2 half"
is "wint2" with activations in half precision where that takes int8 pieces.

Without a GPU the op runs in the host emulator on a small shape, to show that the script and the kernels work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_kernels.build import Variant, device_arch, warm_up
from cuda_kernels.launch import Argument, Device, Grid, cuda_device
from cuda_kernels.moe_wint2 import launch_moe_wint2, moe_wint2
from cuda_kernels.packing import PackedWint2, pack_wint2
from cuda_kernels.tiled_linear import launch_moe_tiled
from tests.bench.moe_rivals import (
    LAYERS,
    SHAPES,
    Contender,
    Prepare,
    Routing,
    Shape,
    bfloat_contender,
    in_turn,
    int4_contender,
    random_tiled_layer,
    wint4_contender,
)
from tests.bench.results import save
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import code_parameters, layer
from tests.cuda_kernels.small_cases import Watched

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)
OPS = "wint2", "wint2 any codes", "wint2 half", "wint2 bfloat", "wint4", "torch int4", "torch bfloat"
MAX_DECODED_TOKENS = 64
MANY_CALLS, FEW_CALLS, MAX_TOKENS_OF_MANY = 8, 4, 128  # in a row, by the number of tokens
# What the kernels are built with for activations in half precision, and for the method's own arithmetic.
HALF = {"PIECES": 0}
BFLOAT = HALF | {"WINT2_BFLOAT": 1}


@dataclass(frozen=True)
class Machine:
    """What the device does at its best: bytes a second of a copy, operations a second of a bfloat product."""

    copy_bytes: float
    bfloat_flops: float


class WithMacros:
    """A device whose expert kernels are built with other macros."""

    def __init__(self, device: Device, macros: dict[str, int]) -> None:
        self.num_multiprocessors, self.shared_bytes = device.num_multiprocessors, device.shared_bytes
        self.has_warpgroup_products = device.has_warpgroup_products
        self._device, self._macros = device, macros

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        *,
        overlaps: bool = False,
    ) -> None:
        if variant.stem in ("moe_wint2", "expert_batch"):
            variant = Variant(variant.stem, tuple((dict(variant.defines) | self._macros).items()))
        self._device.launch(variant, kernel, grid, threads, shared_bytes, arguments, overlaps=overlaps)


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        emulate()
        return
    torch.manual_seed(0)
    machine = measure_machine()
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, CUDA {torch.version.cuda}, torch {torch.__version__}")
    print(
        f"copy {machine.copy_bytes / 1e12:.2f} TB/s, bfloat product {machine.bfloat_flops / 1e12:.0f} TFLOP/s"
    )
    layers = {name: compare(SHAPES[name], name, arguments, machine) for name in arguments.model}
    save(arguments.output, asdict(machine) | {"layers": layers})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ops", type=lambda text: text.split(","), default=OPS, help=", ".join(OPS))
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def emulate() -> None:
    print("no GPU: the kernels run in the host emulator, on a small layer; there is nothing to time")
    case = layer(3, 4, 2, 256, 136)
    with tempfile.TemporaryDirectory() as folder:
        out = launch_moe_wint2(Emulator(Path(folder)), *case.arguments).double()
    reference = moe_wint2(*case.arguments).double()
    print(f"3 tokens, 4 experts, 256 x 136: error {float((out - reference).norm() / reference.norm()):.1e}")


def measure_machine() -> Machine:
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(block)
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    copy = statistics.median(times(lambda: other.copy_(block), 10))
    products = statistics.median(times(lambda: [square @ square for _ in range(MANY_CALLS)], 10))
    return Machine(2 * block.numel() / copy, MANY_CALLS * 2 * 8192**3 / products)


def compare(shape: Shape, name: str, arguments: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    tokens: list[int] = arguments.tokens
    contenders = [contender for contender in wint2_contenders(shape) if contender.name in arguments.ops]
    rivals_of = {"wint4": wint4_contender, "torch int4": int4_contender, "torch bfloat": bfloat_contender}
    contenders += [prepare(shape) for name, prepare in rivals_of.items() if name in arguments.ops]
    build_ahead(shape, tokens)
    print(f"\nERNIE-4.5-{name.upper()}: {shape}")
    print(f"{'tokens':>6}  {'op':16}{'us':>9}{'GB/s':>7}{'% copy':>8}{'TFLOP/s':>9}{'% bf16':>8}", end="")
    print("   times as fast as torch's int4, torch's bfloat")
    found = []
    for num_tokens in tokens:
        hidden = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
        calls = MANY_CALLS if num_tokens <= MAX_TOKENS_OF_MANY else FEW_CALLS
        routings = [make_routing(num_tokens, shape) for _ in range(calls)]
        allowed = [contender for contender in contenders if num_tokens <= contender.max_tokens]
        medians = [seconds_of(contender, hidden, routings, arguments.repeats) for contender in allowed]
        rivals = {c.name: seconds for c, seconds in zip(allowed, medians, strict=True) if "torch" in c.name}
        for contender, seconds in zip(allowed, medians, strict=True):
            figures = row(contender, seconds, num_tokens, routings, shape)
            print(line(figures, machine, rivals), flush=True)
            found.append(figures)
    return found


def build_ahead(shape: Shape, tokens: Sequence[int]) -> None:
    """Builds in parallel what will be launched, which a device that launches nothing is told of."""
    device, noted = cuda_device(0), Watched(None)
    noted.num_multiprocessors, noted.shared_bytes = device.num_multiprocessors, device.shared_bytes
    noted.has_warpgroup_products = device.has_warpgroup_products
    packed, (up_gate, down) = random_layer(shape, "grid"), random_tiled_layer(shape)
    for num_tokens in tokens:
        hidden = torch.empty(num_tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        routed = (hidden, *make_routing(num_tokens, shape).tensors)
        for target in (noted, WithMacros(noted, HALF), WithMacros(noted, BFLOAT)):
            launch_moe_wint2(target, *routed, *packed)
        launch_moe_tiled(noted, *routed, up_gate, down)
    warm_up((variant for variant, _ in noted.launched), device_arch(torch.cuda.get_device_capability()))


def row(
    contender: Contender, seconds: float, num_tokens: int, routings: list[Routing], shape: Shape
) -> dict[str, Any]:
    used = statistics.mean(len(routing.used) for routing in routings)
    return {
        "tokens": num_tokens,
        "op": contender.name,
        "seconds": seconds,
        "bytes_per_second": used * contender.bytes_per_expert / seconds,
        "flops": 2 * num_tokens * shape.experts_per_token * shape.expert_weights / seconds,
    }


def line(figures: dict[str, Any], machine: Machine, rivals: dict[str, float]) -> str:
    seconds, rate, flops = (figures[name] for name in ("seconds", "bytes_per_second", "flops"))
    text = f"{figures['tokens']:6}  {figures['op']:16}{seconds * 1e6:9.1f}{rate / 1e9:7.0f}"
    text += f"{rate / machine.copy_bytes:8.0%}{flops / 1e12:9.1f}{flops / machine.bfloat_flops:8.0%}"
    ratios = (rivals[name] / seconds if name in rivals else None for name in ("torch int4", "torch bfloat"))
    return text + "".join(f"{'':9}" if ratio is None else f"{ratio:9.2f}" for ratio in ratios)


def make_routing(num_tokens: int, shape: Shape) -> Routing:
    scores = torch.rand(num_tokens, shape.num_experts, device="cuda")
    ids = scores.topk(shape.experts_per_token).indices.int()
    return Routing(ids, torch.rand(num_tokens, shape.experts_per_token, device="cuda"))


def seconds_of(contender: Contender, hidden: Tensor, routings: list[Routing], repeats: int) -> float:
    runs = [contender.prepare(hidden, routing) for routing in routings]
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return statistics.median(times(graph.replay, repeats)) / len(runs)


def times(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, L2 overwritten before it."""
    waste = torch.empty(2**26, dtype=torch.int32, device="cuda")
    found = []
    for value in range(repeats):
        waste.fill_(value)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e-3)
    return found


def wint2_contenders(shape: Shape) -> list[Contender]:
    """On the grid of 1/128 codes take the short product, others 32-bit integers, one in thousands floats."""
    device = cuda_device(0)
    grid, general = ([random_layer(shape, kind) for _ in range(LAYERS)] for kind in ("grid", "any"))
    size = sum(packed_bytes(packed) for packed in grid[0]) / shape.num_experts
    runs = (
        ("wint2", device, grid),
        ("wint2 any codes", device, general),
        ("wint2 half", WithMacros(device, HALF), grid),
        ("wint2 bfloat", WithMacros(device, BFLOAT), grid),
    )
    return [
        Contender(
            name,
            size,
            MAX_DECODED_TOKENS if target is not device else 2**20,
            in_turn([wint2_run(target, packed) for packed in layers]),
        )
        for name, target, layers in runs
    ]


def wint2_run(device: Device, packed: tuple[PackedWint2, PackedWint2]) -> Prepare:
    return lambda hidden, routing: (
        lambda: launch_moe_wint2(device, hidden, routing.ids_TA, routing.weights_TA, *packed)
    )


def random_layer(shape: Shape, kind: str) -> tuple[PackedWint2, PackedWint2]:
    """One expert's random weights, as often as there are experts."""
    up_gate = random_expert(shape.hidden, 2 * shape.intermediate, kind, is_gated=True)
    down = random_expert(shape.intermediate, shape.hidden, kind, is_gated=False)
    return repeated(up_gate, shape.num_experts), repeated(down, shape.num_experts)


def random_expert(num_rows: int, num_columns: int, kind: str, *, is_gated: bool) -> PackedWint2:
    code_scale, code_zp = (tensor.cuda() for tensor in code_parameters(kind, (1, num_columns)))
    return pack_wint2(
        torch.randint(0, 256, (1, num_rows // 4, num_columns), dtype=torch.uint8, device="cuda"),
        torch.randint(0, 256, (1, num_rows // 128, num_columns), dtype=torch.uint8, device="cuda"),
        (torch.rand(1, num_columns, device="cuda") * 1e-3 + 1e-4).bfloat16(),
        code_scale,
        code_zp,
        is_gated=is_gated,
    )


def repeated(packed: PackedWint2, times: int) -> PackedWint2:
    return packed.map_tensors(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))


def packed_bytes(packed: PackedWint2) -> int:
    tensors = (packed.records, packed.channels, packed.arithmetic, packed.super_scales)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
