"""The ops' tests can fail: each planted bug in a copy of a kernel changes the emulator's result."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cuda_kernels import attention_kernels, norm, rope, routing, tiled_linear
from cuda_kernels.build import SOURCES
from cuda_kernels.launch import Device
from cuda_kernels.tiled import Bits, pack_tiled
from tests.cuda_kernels.attention_cases import Lengths, case
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import packed_trellis

Run = Callable[[Device], torch.Tensor]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def run_norm(device: Device) -> torch.Tensor:
    return norm.launch_rms_norm(device, drawn(2, 576), drawn(2, 576), drawn(576), 1e-5)[0]


def run_rope(device: Device) -> torch.Tensor:
    query, key = drawn(2, 4, 64), drawn(2, 2, 64)
    rope.launch_rope(device, query, key, torch.tensor([3, 9]), rope.cos_sin_table(16, 64, 1e4))
    return query


def run_route(device: Device) -> torch.Tensor:
    logits = drawn(2, 40).float().round()  # many are equal
    return routing.launch_route(device, logits, torch.zeros(40), 6, 1e-12)[0]


def attention(
    lengths: Lengths, seed: int = 0, is_hopper: bool = False, heads: tuple[int, int] = (8, 2)
) -> Run:
    of = case(lengths, heads, 64, seed=seed)

    def run(device: Device) -> torch.Tensor:
        assert isinstance(device, Emulator)
        device = replace(device, has_warpgroup_products=is_hopper)
        return attention_kernels.launch_attention(device, of.query, of.step, of.max_query_len, of.scale)

    return run


def streamed(bits: Bits, num_rows: int = 3) -> Run:
    levels = torch.randint(-7, 8, (32, 640), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale = None if bits == 16 else torch.ones(32)
    weight = pack_tiled(levels.bfloat16() if bits == 16 else levels, scale, bits=bits)
    return lambda device: tiled_linear.launch_tiled_linear(device, drawn(num_rows, 640), weight)


def run_trellis(device: Device) -> torch.Tensor:
    torch.manual_seed(1)
    up_gate, down = packed_trellis(64, 640, True), packed_trellis(640, 32)
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    return tiled_linear.launch_moe_tiled(device, drawn(3, 640), ids, weights, up_gate, down)


decode, prefill, mixture = attention(((1, 500),)), attention(((70, 90),)), attention(((1, 40), (9, 20)))
# Six tiles of keys: every slot, and the first ones again.
hopper = attention(((300, 650),), is_hopper=True, heads=(1, 1))
HOPPER, BATCH = "attention_hopper.cu", "tiled_batch.cu"
PLANTED: dict[str, tuple[Run, str, str, str]] = {
    "norm without its barrier": (run_norm, "norm.cu", "    sync_block();\n    float sum", "    float sum"),
    "norm of the wrong width": (run_norm, "norm.cu", "/ (8 * vectors)", "/ vectors"),
    "rope turning backwards": (run_rope, "rope.cu", "x * cos - y * sin", "x * cos + y * sin"),
    "the higher of equal experts": (run_route, "route.cu", "a.expert < b.expert", "a.expert > b.expert"),
    "keys past the end": (decode, "attention_decode.cu", "mask(scores, position, share.end);", ""),
    # Of its own data: what an earlier run left in memory would be right.
    "a share too early": (
        attention(((1, 500),), seed=7),
        "attention_decode.cu",
        "+ 1 == (u32)live",
        "+ 2 == (u32)live",
    ),
    "shares weighed too early": (
        decode,
        "attention_decode.cu",
        "        sync_block();\n        for (int row",
        "        for (int row",
    ),
    "keys of the future": (prefill, "attention_prefill.cu", "% 2 > last[i / 2]", "% 2 > last[i / 2] + 1"),
    "copies not waited for": (prefill, "attention_prefill.cu", "wait_copies<1>", "wait_copies<2>"),
    "a stage overwritten": (prefill, "attention_prefill.cu", "(turn ^ 1) * STAGE_BYTES, cache", "0, cache"),
    "other keys of the future": (hopper, HOPPER, "% 2 > last[i / 2]", "% 2 > last[i / 2] + 1"),
    "sums below an earlier top": (hopper, HOPPER, "*= factor[i / 2]", "*= 1"),
    "a slot shown too early": (hopper, HOPPER, "wait_copies<LAG>", "wait_copies<LAG + 1>"),
    "rows not swizzled": (
        hopper,
        HOPPER,
        "swizzled(base + i, chunk % 8)",
        "swizzled((base + i) & ~7, chunk % 8)",
    ),
    "values of the wrong rows": (hopper, "warpgroup.cuh", "slice + 2 * t + 8)", "slice + 2 * t)"),
    "decodes left out": (mixture, "attention_decode.cu", "- token != 1) return", "- token == 1) return"),
    "nibbles swapped": (streamed(4), "tiled.cuh", ">> 8 * (index % 2)", ">> 8 * (1 - index % 2)"),
    "a byte as unsigned": (streamed(8), "tiled.cuh", "0xC000C000u", "0x80008000u"),
    "warps added too early": (streamed(8), "tiled_linear.cu", "    sync_block();\n", ""),
    "another lane's piece": (streamed(8, 20), BATCH, "chunk * 4 + t :", "chunk * 4 + (t ^ 1) :"),
    "rows read too early": (streamed(8, 20), BATCH, "wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>"),
    "rows of others not waited for": (
        streamed(8, 20),
        BATCH,
        "        sync_block();\n        copies",
        "        copies",
    ),
    "history of the wrong lane": (run_trellis, "tiled.cuh", "shuffle_up(high, 1)", "shuffle_up(high, 2)"),
    "history of no other chunk": (run_trellis, "tiled.cuh", "other : beside;", "other : 0;"),
    "local scale of the wrong group": (run_trellis, "tiled.cuh", "t < 2 ? 20 : 16", "t < 2 ? 16 : 20"),
    "a chunk left out": (
        streamed(16),
        "tiled_linear.cu",
        "(chunks - my_warp_k() + WARPS_K - 1)",
        "(chunks - my_warp_k())",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_changes_the_result(bug: str, tmp_path: Path, emulator: Emulator) -> None:
    run, file, old, new = PLANTED[bug]
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (sources / file).write_text(text.replace(old, new, 1))
    # First the bad one: the good one's results may stay in memory that the next run is given.
    bad = run(Emulator(tmp_path, sources=sources, seed=1))
    attention_kernels._counters.cache_clear()  # a bug may leave them dirty
    good = run(emulator)
    assert not torch.equal(good, bad)
