"""The emulator catches what it is for: bugs of each class, planted in copies of the clean kernels."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_kernels import moe_wint2 as op
from cuda_kernels.build import SOURCES
from cuda_kernels.expert_batch import BATCH_ROWS, batch_projection
from cuda_kernels.expert_gemm import GemmTiling, gemm_projection
from tests.cuda_kernels.emulator.emulator import HERE, Emulator, EmulatorError
from tests.cuda_kernels.generators import layer

SANITIZER = ("-fsanitize=address",)
PROGRAM = """
import sys
from pathlib import Path
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.test_emulator import decode_h
decode_h(Emulator(Path(sys.argv[1]), sources=Path(sys.argv[2]), seed=5, flags=tuple(sys.argv[3:])))
"""


def decode_h(emulator: Emulator, outlier: float | None = None) -> torch.Tensor:
    """The gate and up projection of a few tokens: bf16 h by position."""
    case = layer(3, 4, 2, 256, 136, kind="grid")
    if outlier is not None:
        case.hidden[:, ::128] = outlier
    tiling = op._fit(4, 4, case.up_gate.num_steps, emulator.shared_bytes)
    assert tiling is not None
    h_RF = torch.zeros(6, case.up_gate.num_features, dtype=torch.bfloat16)
    routed = op.route_rows(emulator, case.expert_ids, 4, tiling.rows)
    op.project(emulator, case.up_gate, tiling, routed, case.hidden, h_RF, None)
    return h_RF


def outlier_h(emulator: Emulator) -> torch.Tensor:
    """The same where a row's values are too different in size for int8 pieces."""
    return decode_h(emulator, outlier=1e6)


def gemm_h(emulator: Emulator) -> torch.Tensor:
    """The same by the kernel for many tokens."""
    case = layer(3, 4, 2, 256, 136, kind="grid")
    h_RF = torch.zeros(6, case.up_gate.num_features, dtype=torch.bfloat16)
    rows = op.sort_rows(emulator, case.expert_ids, 4, 16)
    gemm_projection(emulator, case.up_gate, GemmTiling(16, 4), rows, case.hidden, h_RF, None)
    return h_RF


def batch_h(emulator: Emulator, width: int = 5376) -> torch.Tensor:
    """The same by the kernel for several rows an expert; the ring of tokens comes round."""
    case = layer(3, 4, 2, width, 136, kind="grid")
    h_RF = torch.zeros(6, case.up_gate.num_features, dtype=torch.bfloat16)
    rows = op.sort_rows(emulator, case.expert_ids, 4, BATCH_ROWS)
    batch_projection(emulator, case.up_gate, rows, case.hidden, h_RF, None)
    return h_RF


def planted(folder: Path, libraries: Path, file: str, old: str, new: str) -> Emulator:
    """An emulator of the kernels with `old` in `file` replaced once."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (sources / file).write_text(text.replace(old, new, 1))
    return Emulator(libraries, sources=sources, seed=5)


WRONG = {
    "no barrier after staging": (
        outlier_h,
        "moe_wint2.cu",
        "x.stage(results.rows, tile, span);\n        sync_block();",
        "x.stage(results.rows, tile, span);",
    ),
    "no wait for the other warps' sums": (
        decode_h,
        "moe_wint2.cu",
        "if (!is_first) reduction.wait();",
        "",
    ),
    "no wait for a copy": (
        decode_h,
        "expert_stream.cuh",
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
    ),
    "wrong nibble": (decode_h, "expert_pieces.cuh", "scales >> 4 & 0x0F", "scales >> 0 & 0x0F"),
    "wrong byte of a piece": (decode_h, "expert_pieces.cuh", "bytes<1>(whole + 4)", "bytes<1>(whole)"),
    "an outlier for a loss": (outlier_h, "expert_pieces.cuh", "square <= outlier", "square <= 9 * outlier"),
    "off by one in a row's end": (
        decode_h,
        "activations.cuh",
        "return k < length ?",
        "return k < length - 2 ?",
    ),
    "a chunk of tokens read before it has come": (
        batch_h,
        "expert_batch.cu",
        "wait_for_phase(&landed[turn % SLOTS], turn / SLOTS);",
        "",
    ),
    "a chunk of tokens in another's slot": (
        batch_h,
        "expert_batch.cu",
        "copy_block(slot(i),",
        "copy_block(slot((i + 1) % SLOTS),",
    ),
    "another group's start values": (
        batch_h,
        "expert_batch.cu",
        "in_chunk * START",
        "(in_chunk ^ 1) * START",
    ),
    "no barrier in the ring of tokens": (
        gemm_h,
        "expert_gemm.cu",
        "show_shared();\n        sync_block();",
        "show_shared();",
    ),
    "wrong swizzle": (gemm_h, "token_mma.cuh", "swizzled(row, 2 * slice + 1)", "swizzled(row, 2 * slice)"),
}


@pytest.mark.parametrize("bug", WRONG)
def test_a_planted_bug_changes_the_result(bug: str, tmp_path: Path, emulator_folder: Path) -> None:
    run, *edit = WRONG[bug]
    bad = run(planted(tmp_path, emulator_folder, *edit))
    assert not torch.equal(bad, run(Emulator(emulator_folder)))


def test_the_kernels_agree(emulator_folder: Path) -> None:
    wanted = decode_h(Emulator(emulator_folder))
    torch.testing.assert_close(gemm_h(Emulator(emulator_folder)), wanted, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(batch_h(Emulator(emulator_folder), 256), wanted, rtol=2**-7, atol=1e-3)


def test_a_divergent_warp_instruction_is_a_deadlock(tmp_path: Path, emulator_folder: Path) -> None:
    old, new = "sum += shuffle_xor(sum, lanes);", "if (is_live) sum += shuffle_xor(sum, lanes);"
    with pytest.raises(EmulatorError, match="deadlock"):
        decode_h(planted(tmp_path, emulator_folder, "expert_pieces.cuh", old, new))


def sanitized(folder: Path, sources: Path) -> subprocess.CompletedProcess[str]:
    find = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    options = "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99"
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": options}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(sources), *SANITIZER]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_address_sanitizer_passes_the_clean_kernels(tmp_path: Path) -> None:
    done = sanitized(tmp_path, SOURCES)
    assert done.returncode == 0, done.stderr


def test_address_sanitizer_catches_an_off_by_one(tmp_path: Path) -> None:
    old, new = "if (channel >= out.channels) return;", "if (channel > out.channels) return;"
    sources = planted(tmp_path, tmp_path, "expert_pair.cuh", old, new).sources
    done = sanitized(tmp_path, sources)
    assert done.returncode == 99, done.stderr
    assert "heap-buffer-overflow" in done.stderr


def test_half_and_bfloat_conversions_are_torch_s(tmp_path: Path) -> None:
    source = tmp_path / "convert.cpp"
    source.write_text(
        "#include <algorithm>\nusing u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned;\n"
        '#include "device.h"\n'
        'extern "C" void convert(const float* x, int n, u32* half, u32* bfloat, float* back) {\n'
        "for (int i = 0; i < n; ++i) { half[i] = emulator::float_to_half(x[i]);"
        " bfloat[i] = emulator::float_to_bfloat(x[i]); back[i] = emulator::half_to_float(half[i]); } }"
    )
    library = tmp_path / "convert.so"
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", f"-I{HERE}", source, "-o", library], check=True)
    torch.manual_seed(0)
    ordinary = torch.randn(4000) * 2.0 ** torch.randint(-30, 20, (4000,))
    x = torch.cat([ordinary, torch.tensor([0.0, 65519.0, 6e-8, 1e9])])
    half, bfloat, back = x.int(), x.int(), x.clone()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, half, bfloat, back)]
    ctypes.CDLL(str(library)).convert(pointers[0], len(x), *pointers[1:])
    assert torch.equal(half.short(), x.half().view(torch.int16))
    assert torch.equal(bfloat.short(), x.bfloat16().view(torch.int16))
    assert torch.equal(back, x.half().float())
