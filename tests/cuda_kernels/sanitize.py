"""Every kernel under compute-sanitizer, on small shapes: `make sanitize`.

python -m tests.cuda_kernels.sanitize [--tools memcheck racecheck synccheck initcheck] [--logs FOLDER]

The kernels are built first; then each tool watches one process that launches them one by one, without graphs
and with each tensor in an allocation of its own, so that a step past its end is seen. What they compute is
compared with the oracles as well.

Where a warp's first lane arrives at a barrier for all of its lanes, they have met before (`sync_warp`), which
orders what they did before what others do after the barrier. racecheck does not follow that, and reports
each such place. Nor does it follow the counter by which the last warp to leave a chunk of `expert_batch`
knows that it is the last. It therefore watches copies of the kernels in which every lane arrives by itself,
and all warps leave a chunk by a barrier of the block, which differ in nothing else; `--tools racecheck-as-is`
watches the kernels themselves.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from cuda_kernels import build
from cuda_kernels.build import device_arch, warm_up
from cuda_kernels.launch import cuda_device
from tests.cuda_kernels.small_cases import Case, Watched, cases

TOOLS = {
    "memcheck": ["--padding", "256"],
    "racecheck": [],
    "synccheck": [],
    "initcheck": [],
    "racecheck-as-is": [],
}
SECONDS = 240
_FIRST_LANE_ARRIVES = re.compile(r"if \((?:my_lane\(\)|threadIdx\.x % 32) == 0\) (arrive_at\()")
# The last warp to leave refills, as a counter tells it; or one warp does, once all have come to a barrier.
_COUNTED = """        sync_warp();
        u32 before = my_lane() == 0 ? count_call(&leavings[turn % SLOTS]) : 0;
        if ((largest_in_warp(before) + 1) % WARPS == 0) fill(turn % SLOTS);
"""
_TOGETHER = """        sync_block();
        if (my_warp() == 0) fill(turn % SLOTS);
"""
_OF_WARPS = re.compile(r"(init_barrier\([^;]+), (WARPS|4 \* GROUPS)\)")
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+) .*", re.MULTILINE)
_FINDING = re.compile(
    r"^========= ((?:Error|Warning|Invalid|Uninitialized|Barrier|Program)[^\n]*)", re.MULTILINE
)


@dataclass(frozen=True)
class Verdict:
    """What a tool said of the run, and whether the run itself was right."""

    tool: str
    seconds: float
    return_code: int
    output: str
    log: str

    @property
    def found(self) -> int | None:
        """Errors or hazards; None if the tool did not come to an end."""
        counts = _SUMMARY.findall(self.log)
        return int(counts[-1]) if counts else None

    @property
    def is_clean(self) -> bool:
        return self.return_code == 0 and self.found == 0

    def lines(self) -> list[str]:
        if self.found is None:
            return [f"{self.tool}: no summary: {(self.output or self.log)[-1500:]}"]
        expected = "some" if self.tool.endswith("-as-is") else "0"
        last = self.output.strip().splitlines()[-1:] or ["the run printed nothing"]
        head = f"{self.tool}: expected {expected}, found {self.found}; {last[0]}; {self.seconds:.0f} s"
        kinds = Counter(_FINDING.findall(self.log)).most_common(20)
        return [head, *(f"  {count} x {text}" for text, count in kinds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS)[:4])
    parser.add_argument("--logs", type=Path, help="folder for what the tools wrote")
    parser.add_argument("--run", action="store_true", help="launch the kernels; the tools watch this")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--sources", type=Path, default=build.SOURCES, help="folder of the kernels")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing to watch")
    chosen = [case for case in cases() if args.only in case.name]
    build.SOURCES = args.sources
    if args.run:
        run(chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        copies = write_copies(Path(folder))
        verdicts = []
        for tool in args.tools:
            build.SOURCES = copies if tool == "racecheck" else args.sources
            build_cases(chosen)
            verdicts.append(watch(tool, args.only, args.logs or Path(folder)))
    sys.exit(0 if all(verdict.is_clean for verdict in verdicts) else 1)


def write_copies(folder: Path) -> Path:
    """The kernels ordered by what racecheck follows: every lane arrives, warps leave a chunk together."""
    copies = folder / "csrc"
    copies.mkdir()
    for path in build.SOURCES.iterdir():
        text = path.read_text().replace(_COUNTED, _TOGETHER)
        if path.suffix == ".cu" and "count_call(" in text:
            raise SystemExit(f"{path.name}: counts calls in another way than the one known here")
        text, arrivals = _FIRST_LANE_ARRIVES.subn(r"\1", text)
        text, barriers = _OF_WARPS.subn(r"\1, 32 * \2)", text)
        if arrivals != barriers:
            raise SystemExit(
                f"{path.name}: {arrivals} arrivals of first lanes at {barriers} barriers of warps"
            )
        (copies / path.name).write_text(text)
    return copies


def build_cases(chosen: list[Case]) -> None:
    """Builds what the cases launch, in parallel, and waits for none of it under a tool."""
    device = Watched(cuda_device(0))
    noted = Watched(None)
    noted.has_warpgroup_products = device.has_warpgroup_products
    for case in chosen:
        case.launch(noted, "cpu")
    warm_up((variant for variant, _ in noted.launched), device_arch(torch.cuda.get_device_capability()))


def run(chosen: list[Case]) -> None:
    device = Watched(cuda_device(0))
    for case in chosen:
        out, wanted = case.launch(device, "cuda").double().cpu(), case.expected().double()
        error = float((out - wanted).norm() / wanted.norm())
        if not error < case.tolerance:
            raise SystemExit(f"{case.name}: off by {error:.1e}")
    kernels = {kernel for _, kernel in device.launched}
    variants = {variant for variant, _ in device.launched}
    print(f"{len(chosen)} cases right, {len(device.launched)} launches of {len(kernels)} kernels", end=" ")
    print(f"in {len(variants)} variants", flush=True)


def watch(tool: str, only: str, logs: Path) -> Verdict:
    """Runs this module under the tool and prints the verdict."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    log = logs / f"{tool}.log"
    command = [sanitizer, "--tool", tool.removesuffix("-as-is"), *TOOLS[tool]]
    command += ["--error-exitcode", "9", "--print-limit", "200"]
    command += ["--log-file", str(log), sys.executable, "-m", "tests.cuda_kernels.sanitize"]
    command += ["--run", "--only", only, "--sources", str(build.SOURCES)]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    text = log.read_text() if log.exists() else ""
    seconds = time.perf_counter() - start
    verdict = Verdict(tool, seconds, done.returncode, done.stdout + done.stderr, text)
    print("\n".join(verdict.lines()), flush=True)
    return verdict


if __name__ == "__main__":
    main()
