"""The emulator catches what it is for: bugs of each class, planted in copies of the clean kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_kernels.build import SOURCES
from tests.cuda_kernels.emulator.emulator import HERE

PROGRAM = """
import sys
from pathlib import Path
from cuda_kernels import moe_wint2 as op
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import layer
case = layer(3, 4, 2, 256, 136, kind="grid")
flags = tuple(sys.argv[3:])
emulator = Emulator(Path(sys.argv[1]), sources=Path(sys.argv[2]), seed=5, flags=flags)
out = op.launch_moe_wint2(emulator, *case.arguments).double()
reference = op.moe_wint2(*case.arguments).double()
error = float((out - reference).norm() / reference.norm())
sys.exit(0 if error < 1e-3 else 3)
"""
WRONG, DEADLOCK = 3, 86
SANITIZER = ("-fsanitize=address", "-g")


def run(folder: Path, edits: list[tuple[str, str, str]], *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a small layer on a copy of the kernels in which each (file, old, new) is replaced."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    for file, old, new in edits:
        text = (sources / file).read_text()
        assert text.count(old) >= 1, f"{file} has no {old!r}"
        (sources / file).write_text(text.replace(old, new, 1))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    if flags:
        find = ["g++", "-print-file-name=libasan.so"]
        library = subprocess.run(find, capture_output=True, text=True, check=True)
        environment |= {
            "LD_PRELOAD": library.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99",
        }
    command = [sys.executable, "-c", PROGRAM, str(folder), str(sources), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


PLANTED = {
    "missing barrier after staging": (
        "moe_wint2.cu",
        "constants.load(weights, tile.expert, share.first_panel(tile_index));\n            sync_block();",
        "constants.load(weights, tile.expert, share.first_panel(tile_index));",
        WRONG,
    ),
    "missing barrier before the reduction": (
        "moe_wint2.cu",
        "reduction.put(acc);\n                sync_block();",
        "reduction.put(acc);",
        WRONG,
    ),
    "missing wait for a copy": (
        "moe_wint2.cu",
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
        WRONG,
    ),
    "divergent barrier": (
        "moe_wint2.cu",
        "reduction.put(acc);\n",
        "if (my_warp()) sync_block();\n",
        WRONG,
    ),
    "divergent shuffle": (
        "moe_wint2.cu",
        "offset += shuffle_xor(offset, 1);",
        "if (live) offset += shuffle_xor(offset, 1);",
        DEADLOCK,
    ),
    "wrong nibble": ("wint2.cuh", "word, 15u << 4 * kIndex", "word, 15u << 4 * (kIndex ^ 1)", WRONG),
    "wrong field": ("wint2.cuh", "u32 shifted = q >> 6;", "u32 shifted = q >> 5;", WRONG),
    "off by one in a row's end": ("moe_wint2.cu", "k < rows.length ?", "k < rows.length - 2 ?", WRONG),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    file, old, new, expected = PLANTED[bug]
    done = run(tmp_path, [(file, old, new)])
    assert done.returncode == expected, done.stderr


def test_clean_kernels_pass_under_address_sanitizer(tmp_path: Path) -> None:
    done = run(tmp_path, [], *SANITIZER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("routing.cu", "if (channel >= channels) return;", "if (channel > channels) return;"),
        (
            "routing.cu",
            "for (int i = threadIdx.x; i < num_routed; i",
            "for (int i = threadIdx.x; i <= num_routed; i",
        ),
    ],
    ids=["read past the end", "write past the end"],
)
def test_address_sanitizer_catches_an_off_by_one(file: str, old: str, new: str, tmp_path: Path) -> None:
    done = run(tmp_path, [(file, old, new)], *SANITIZER)
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
    import ctypes

    torch.manual_seed(0)
    ordinary = torch.randn(4000) * 2.0 ** torch.randint(-30, 20, (4000,))
    x = torch.cat([ordinary, torch.tensor([0.0, 65519.0, 6e-8, 1e9])])
    half, bfloat, back = x.int(), x.int(), x.clone()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, half, bfloat, back)]
    ctypes.CDLL(str(library)).convert(pointers[0], len(x), *pointers[1:])
    assert torch.equal(half.short(), x.half().view(torch.int16))
    assert torch.equal(bfloat.short(), x.bfloat16().view(torch.int16))
    assert torch.equal(back, x.half().float())
