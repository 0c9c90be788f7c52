"""What the arithmetic of the decode loop alone allows: bfloat, half precision and exact int8 side by side.

python -m tests.bench.bench_decode_variants [--output FILE.json]

A warp multiplies its pair of tiles with up to eight token rows again and again, weights and activations in
shared memory (decode_variants.cu), so that instructions alone take time. "GB/s" is what the weights decoded
in a second take as 2-bit data with local scales; "copy" is the rate of a large copy in the same run. Results
are compared with float64. Without a GPU the kernels run in the host emulator and instructions are counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cuda_kernels import driver
from cuda_kernels.build import SOURCES, Variant, compile_cubin, device_arch
from cuda_kernels.launch import Argument
from cuda_kernels.moe_wint2 import dequantize_packed
from cuda_kernels.packing import Arithmetic, PackedWint2
from tests.bench.results import save
from tests.cuda_kernels import sass
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import packed

HERE = Path(__file__).parent
WARPS, ROWS, STEPS = (
    16,
    8,
    8,
)  # of the kernel: warps of a CTA, columns of an mma, steps of 128 in shared memory
GROUPS, K, N = 2 * STEPS, 128 * STEPS, 32 * WARPS
LANE_WEIGHTS = 2 * 16 * 128 // 32  # a lane, of one step
BYTES_PER_WEIGHT = (2 + 4 / 64) / 8
TURNS, RUNS = 400, 9
SCALED = torch.tensor([1, 1, 4, 4])  # of a code's fields: those that the int8 loop leaves multiplied by 4


@dataclass(frozen=True)
class Arm:
    """One arithmetic; `pieces` as in decode_variants.cu."""

    name: str
    codes: Arithmetic
    pieces: int = 0
    is_bfloat: bool = False

    @property
    def variant(self) -> Variant:
        defines = {"CODES": int(self.codes), "PIECES": self.pieces}
        defines |= {"WINT2_BFLOAT": 1} if self.is_bfloat else {}
        return Variant("decode_variants", tuple(defines.items()))

    @property
    def rows(self) -> int:
        return 4 if self.pieces == 1 else ROWS

    @property
    def sets(self) -> int:
        return 2 if self.pieces == 2 else 1


ARMS = [
    Arm(f"{name}, {codes.name.lower()} codes", codes, pieces, is_bfloat)
    for codes in (Arithmetic.SHORT, Arithmetic.INTEGERS)
    for name, pieces, is_bfloat in (
        ("bfloat", 0, True),
        ("half", 0, False),
        ("int8, 4 rows", 1, False),
        ("int8, 8 rows", 2, False),
    )
]


@dataclass(frozen=True)
class Operands:
    """What the kernel takes beside the weights, and what its sums must be multiplied with, row by row."""

    fragments: Tensor
    starts: Tensor
    unit_R: Tensor


@dataclass(frozen=True)
class Figures:
    """One row of the table; without a GPU there are no times."""

    name: str
    rows: int
    instructions_per_weight: float
    error: float
    weights_per_second: float | None = None
    bytes_per_second: float | None = None


def weights_of(arm: Arm) -> PackedWint2:
    """A projection all of whose channels take the arm's arithmetic."""
    kind = "grid" if arm.codes == Arithmetic.SHORT else "any"
    for seed in range(100):
        torch.manual_seed(seed)
        found = packed(1, K, N, is_gated=False, kind=kind, k_order="natural")
        if bool((found.arithmetic == arm.codes).all()):
            return found
    raise RuntimeError(f"no random weights for {arm.name}")


def operands(arm: Arm, x_RK: Tensor) -> Operands:
    fields = x_RK.double().view(arm.rows, GROUPS, 4, 2, 2, 4)  # row, group, t, half, code, field
    return float_operands(arm, fields) if arm.pieces == 0 else byte_operands(arm, fields)


def float_operands(arm: Arm, fields: Tensor) -> Operands:
    """Divided by the fields' factors; the accumulators start from minus the fields' offsets."""
    if arm.is_bfloat:
        unit, factor, offset = 1.0, torch.full((4,), 0.5), torch.full((4,), 192.0)
    else:
        unit, factor = 2.0**10, torch.tensor([0.0625, 0.5, 0.0625, 0.5])
        offset = torch.tensor([1536.0, 1088.0, 1536.0, 1088.0])
    values = (fields * unit * factor).to(torch.bfloat16 if arm.is_bfloat else torch.float16)
    words = values.flip(-1).transpose(-1, -2).permute(1, 3, 0, 2, 4, 5)  # group half row t field code
    starts_GR = -(values.double() * offset).sum((2, 3, 4, 5)).T.float()
    return Operands(words.contiguous(), starts_of(starts_GR), torch.full((ROWS,), 1 / unit))


def byte_operands(arm: Arm, fields: Tensor) -> Operands:
    """Sixteen bits in two pieces; bytes in the order of those that the kernel cuts out."""
    unit_R = 2.0 ** torch.floor(torch.log2(32512 / fields.abs().amax((1, 2, 3, 4, 5))))
    whole = (fields * unit_R.view(-1, 1, 1, 1, 1, 1) / SCALED).round()
    upper = ((whole + 128) / 256).floor()  # what is left lies in -128..127
    pieces = torch.stack([upper, whole - 256 * upper])  # piece row group t half code field
    starts_PRG = -32 * (pieces * SCALED).sum((3, 4, 5, 6))
    ordered = pieces[..., [3, 1, 2, 0]].unflatten(-1, (2, 2)).transpose(-2, -3)  # ... (odd, even) code field
    if arm.pieces == 1:  # group half (piece row) t
        bytes_ = ordered.permute(2, 4, 0, 1, 3, 5, 6, 7)
        starts = starts_of(starts_PRG.flatten(0, 1).T.int())
    else:  # group half row t piece
        bytes_ = ordered.permute(2, 4, 1, 3, 0, 5, 6, 7)
        starts = torch.stack([starts_of(piece.T.int()) for piece in starts_PRG], dim=1)
    return Operands(bytes_.contiguous().to(torch.int8), starts.contiguous(), (1 / unit_R).float())


def starts_of(columns_GR: Tensor) -> Tensor:
    """[G, t, 4]: lane t's columns 2t and 2t+1 for row g, and again for row g+8."""
    pairs = columns_GR.unflatten(1, (4, 2))
    return torch.cat([pairs, pairs], dim=-1).contiguous()


def results(arm: Arm, sums: Tensor, unit_R: Tensor, weights: PackedWint2) -> Tensor:
    """The first CTA's sums as float64 [R, N]."""
    raw = sums.cpu()[: WARPS * 2 * arm.sets * 128]
    values = (raw.view(torch.float32) if arm.pieces == 0 else raw).double()
    lanes = values.view(WARPS, 2, arm.sets, 2, 2, 8, 4)  # warp tile set r j g t
    columns = lanes.permute(2, 6, 4, 0, 1, 3, 5).reshape(arm.sets, ROWS, N)
    if arm.pieces:
        upper, lower = columns[0].chunk(2) if arm.pieces == 1 else columns
        columns = (256 * upper + lower).unsqueeze(0)
    return columns[0] * unit_R.unsqueeze(1).double() * weights.super_scales.flatten().double().cpu()


class Bench:
    """One arm's inputs, its sums for one pass, and what they should be."""

    def __init__(self, arm: Arm) -> None:
        self.arm, self.weights = arm, weights_of(arm)
        x_RK = torch.randn(arm.rows, K).bfloat16()
        self.operands = operands(arm, x_RK)
        self.expected = x_RK.double() @ dequantize_packed(self.weights, 0)

    def arguments(self, place: str, num_ctas: int, repeats: int) -> list[Argument]:
        sums = torch.zeros(num_ctas * WARPS * 2 * self.arm.sets * 128, dtype=torch.int32)
        tensors = self.weights.records, self.weights.channels, self.operands.fragments, self.operands.starts
        return [*(t.to(place) for t in (*tensors, sums)), STEPS, repeats]

    @property
    def shared_bytes(self) -> int:
        tensors = self.weights.records, self.operands.fragments, self.operands.starts
        return sum(tensor.nbytes for tensor in tensors)

    def error(self, arguments: list[Argument]) -> float:
        """Of the sums that one pass left."""
        sums = arguments[4]
        assert isinstance(sums, Tensor)
        found = results(self.arm, sums, self.operands.unit_R, self.weights)
        return float((found - self.expected).norm() / self.expected.norm())


def instructions_per_weight(cubin: bytes) -> float:
    """Of the loop over steps."""
    with tempfile.TemporaryDirectory() as folder:
        code = sass.disassemble(cubin, Path(folder))
    is_product = {"HMMA", "IMMA"}
    return (
        min(len(loop) for loop in sass.loops(code) if is_product & sass.opcodes(loop).keys()) / LANE_WEIGHTS
    )


def emulate(arm: Arm, folder: Path) -> Figures:
    bench = Bench(arm)
    emulator = Emulator(folder, sources=HERE, flags=(f"-I{SOURCES}",))
    arguments = bench.arguments("cpu", 1, 1)
    emulator.launch(arm.variant, "decode_variant", (1, 1), 32 * WARPS, bench.shared_bytes, arguments)
    cubin = compile_cubin(arm.variant, "sm_90a", HERE)
    return Figures(arm.name, arm.rows, instructions_per_weight(cubin.code), bench.error(arguments))


def measure(arm: Arm, folder: Path) -> Figures:
    bench, num_ctas = Bench(arm), torch.cuda.get_device_properties(0).multi_processor_count
    cubin = compile_cubin(arm.variant, device_arch(torch.cuda.get_device_capability()), HERE)
    function, module = load(cubin.code, folder / f"{arm.codes.name}{arm.pieces}{arm.is_bfloat}.cubin")
    driver.allow_shared_bytes(function, bench.shared_bytes)

    def launch(repeats: int) -> tuple[float, list[Argument]]:
        arguments = bench.arguments("cuda", num_ctas, repeats)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream().cuda_stream
        start.record()
        driver.launch(function, (num_ctas, 1), 32 * WARPS, bench.shared_bytes, stream, arguments)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3, arguments

    error = bench.error(launch(1)[1])
    launch(TURNS)
    once, twice = (statistics.median(launch(n)[0] for _ in range(RUNS)) for n in (TURNS, 2 * TURNS))
    rate = num_ctas * K * N * TURNS / (twice - once)
    del module
    count = instructions_per_weight(cubin.code)
    return Figures(arm.name, arm.rows, count, error, rate, rate * BYTES_PER_WEIGHT)


def load(cubin: bytes, path: Path) -> tuple[int, object]:
    """The kernel's CUfunction, and the module that must live as long. CuPy knows modules by their paths."""
    import cupy

    path.write_bytes(cubin)
    module = cupy.RawModule(path=str(path))
    return module.get_function("decode_variant").kernel.ptr, module


def copy_rate() -> float:
    """Bytes read and written in a second by a large copy."""
    from tests.bench.gpu_timing import Timer

    return Timer().copy_bytes_a_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    copy = copy_rate() if has_gpu else None
    print(f"{'arithmetic':28} rows  instructions a weight    error   weights/s     GB/s  % of copy")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in ARMS:
            row = (measure if has_gpu else emulate)(arm, Path(folder))
            rows.append(asdict(row))
            print(line(row, copy), flush=True)
    save(args.output, {"copy_bytes_per_second": copy, "rows": rows})


def line(row: Figures, copy: float | None) -> str:
    text = f"{row.name:28}{row.rows:5}{row.instructions_per_weight:23.2f}{row.error:9.1e}"
    if copy and row.weights_per_second and row.bytes_per_second:
        share = row.bytes_per_second / copy
        text += f"{row.weights_per_second:12.3e}{row.bytes_per_second / 1e9:9.0f}{share:11.0%}"
    return text


if __name__ == "__main__":
    main()
