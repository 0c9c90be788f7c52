"""The ops' kernels compile for every architecture without a warning or a spill, within their registers."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from cuda_kernels import attention_kernels, tiled_linear
from cuda_kernels.build import Cubin, Variant, compile_cubin
from cuda_kernels.routing import route_variant
from cuda_kernels.tiled import Bits

FORMATS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
REGISTERS = 65536
# Threads of a block, and blocks a multiprocessor holds at once, as the launch bounds say.
THREADS = {
    "rms_norm": 1024,
    "rope": 256,
    "kv_store": 256,
    "kv_store_int8": 256,
    "kv_store_fp8": 256,
    "route": 128,
    "router": 512,
    "router_of_few": 512,
    "untile": 256,
    "attention_hopper": 384,
    "tiled_linear": 256,
}


def is_tested(variant: Variant) -> bool:
    """Of the streaming kernel each width and tile once: what differs is in the last few lines."""
    defines = dict(variant.defines)
    output = 1 if defines["BITS"] == 2 else defines["BITS"] // 8
    is_one_of_many = defines.get("OUTPUT") == output and defines.get("WARPS_N") != 2
    return variant.stem == "untile" or (is_one_of_many and defines["WARPS"] == 8)


def variants() -> list[Variant]:
    small = [Variant(stem) for stem in ("norm", "rope", "kv_store")] + [route_variant(n) for n in (64, 512)]
    attention = [
        v
        for head_dim, dtype in ((64, FORMATS[0]), *product((128,), FORMATS))
        for v in attention_kernels.variants(head_dim, dtype)
    ] + [attention_kernels.variants(head_dim, is_hopper=True)[1] for head_dim in attention_kernels.HEAD_DIMS]
    widths: tuple[Bits, ...] = (2, 4, 8, 16)
    return small + attention + [v for bits in widths for v in tiled_linear.variants(bits) if is_tested(v)]


def targets(variant: Variant) -> tuple[str, ...]:
    """The architectures that may launch it."""
    return ("sm_90a",) if variant.stem == "attention_hopper" else ARCHITECTURES


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[Variant, str], Cubin]:
    wanted = [(variant, arch) for variant in variants() for arch in targets(variant)]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda which: compile_cubin(*which), wanted), strict=True))


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_compiles_cleanly_everywhere(variant: Variant, cubins: dict[tuple[Variant, str], Cubin]) -> None:
    for arch in targets(variant):
        cubin = cubins[variant, arch]
        assert "warning" not in cubin.log.lower(), cubin.log
        for kernel, usage in cubin.usage.items():
            defines = dict(variant.defines)
            blocks, threads = defines.get("BLOCKS", 1), THREADS.get(kernel, 32 * defines.get("WARPS", 4))
            assert usage.spill_bytes == usage.stack_bytes == usage.shared_bytes == 0, (
                f"{kernel} {arch}: {usage}"
            )
            assert usage.registers * threads * blocks <= REGISTERS, f"{kernel} {arch}: {usage}"
