"""Options, architectures, the cache, readable errors; every kernel compiles everywhere, cleanly."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from cuda_kernels import build
from cuda_kernels.build import Cubin, KernelBuildError, Variant
from tests.cuda_kernels.variants import HOPPER, REPRESENTATIVE

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
REGISTERS_PER_SM = 65536
THREADS = {"expert_projection": 512, "expert_batch": 512, "expert_gemm": 256, "dispatch": 1024}


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")]
)
def test_architecture_of_a_device(capability: tuple[int, int], arch: str) -> None:
    assert build.device_arch(capability) == arch


def test_an_old_device_is_refused_by_name() -> None:
    with pytest.raises(KernelBuildError, match=r"compute capability 7\.5: the kernels need 8\.0"):
        build.device_arch((7, 5))


@pytest.fixture(scope="module")
def cubins() -> dict[tuple[Variant, str], Cubin]:
    wanted = [
        pair
        for pair in product(REPRESENTATIVE, ARCHITECTURES)
        if pair[1] == "sm_90a" or pair[0] not in HOPPER
    ]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda pair: build.compile_cubin(*pair), wanted), strict=True))


def test_every_kernel_compiles_without_warning_or_spill(cubins: dict[tuple[Variant, str], Cubin]) -> None:
    for (variant, arch), cubin in cubins.items():
        assert "warning" not in cubin.log.lower(), f"{variant} for {arch}:\n{cubin.log}"
        assert "serialized" not in cubin.log, f"{variant} for {arch}: products wait for one another"
        assert cubin.usage, cubin.log
        for kernel, usage in cubin.usage.items():
            assert usage.spill_bytes == usage.stack_bytes == 0, f"{variant} for {arch}, {kernel}: {usage}"
            assert usage.shared_bytes == 0, f"{kernel} has static shared memory: {usage}"
            assert usage.registers * THREADS.get(kernel, 256) <= REGISTERS_PER_SM, f"{kernel}: {usage}"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    monkeypatch.setattr(build, "SOURCES", folder)
    (folder / "good.cu").write_text('extern "C" __global__ void f(float* x) { x[threadIdx.x] *= FACTOR; }\n')
    (folder / "bad.cu").write_text("// a comment\nint f( { return 1; }\n")
    return folder


def test_a_compile_error_shows_the_source_line(sources: Path) -> None:
    message = r"(?s)bad for sm_80 does not compile.*2 \| int f\( \{ return 1; \}"
    with pytest.raises(KernelBuildError, match=message):
        build.compile_cubin(Variant("bad"), "sm_80")


def test_the_cache_follows_content_options_and_architecture(sources: Path, tmp_path: Path) -> None:
    def path(factor: int, arch: str = "sm_80") -> Path:
        return build.load_or_build(Variant("good", (("FACTOR", factor),)), arch, tmp_path / "cache")

    first = path(2)
    written = first.stat().st_mtime_ns
    assert path(2) == first
    assert first.stat().st_mtime_ns == written
    assert len({first, path(3), path(2, "sm_90a")}) == 3
    (sources / "good.cu").write_text((sources / "good.cu").read_text() + "// changed\n")
    assert path(2) != first


def test_processes_that_want_the_same_kernel_build_it_once(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    compile_cubin = build.compile_cubin
    monkeypatch.setattr(build, "compile_cubin", lambda *which: built.append(which) or compile_cubin(*which))
    variant = Variant("good", (("FACTOR", 5),))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: build.load_or_build(variant, "sm_80", tmp_path / "c"), range(4)))
    assert len(set(paths)) == len(built) == 1


def test_warm_up_reports_progress(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "warm"
    monkeypatch.setattr(build.load_or_build, "__defaults__", (folder,))
    variants = [Variant("good", (("FACTOR", n),)) for n in (1, 2, 2)]
    seen: list[tuple[int, int]] = []
    build.warm_up(variants, "sm_80", lambda done, total, _: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert len(list(folder.glob("*.cubin"))) == 2


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    build._nvrtc.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(KernelBuildError, match=r"pip install 'wint2\[cuda13\]'"):
        build.compile_cubin(Variant("routing"), "sm_80")
    build._nvrtc.cache_clear()
