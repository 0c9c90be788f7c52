"""Instructions a weight in the decode kernel's inner loops, counted in the machine code, against a budget.

An H100 issues 128 lane-instructions a clock and SM and must decode 50 weights a clock and SM to keep up
with the 3.0 TB/s at which it copies: 2.5 instructions a weight if every slot were used. The method's own
arithmetic (float code, scale in the weight, bfloat) takes 3.7 in such a loop.
"""

from pathlib import Path

import pytest

from cuda_kernels.build import Variant, compile_cubin
from tests.cuda_kernels import sass

WEIGHTS_PER_MMA = 16 * 16 // 32  # a lane's share of one m16n8k16's weights
NAMES = {"LDL", "STL"}


def inner_loops(*defines: tuple[str, int], folder: Path) -> list[tuple[bool, bool, float]]:
    """(has float code, has the long multiplier, instructions a weight) of each loop over steps."""
    variant = Variant("moe_wint2", (("GATED", 1), ("WARPS_K", 8), ("ROWS", 8), ("STAGES", 3), *defines))
    found = []
    for loop in sass.loops(sass.disassemble(compile_cubin(variant, "sm_90a").code, folder)):
        count = sass.opcodes(loop)
        if count["HMMA"] and not count["BAR"] and not count["BSSY"]:
            weights = count["HMMA"] * WEIGHTS_PER_MMA
            found.append((count["FRND"] > 0, count["IMAD"] > 0.25 * weights, len(loop) / weights))
    return found


@pytest.mark.parametrize(
    ("defines", "short_budget", "long_budget"),
    [((), 1.7, 1.95), ((("WINT2_BFLOAT", 1),), 1.95, 2.2)],
    ids=["half", "bfloat"],
)
def test_inner_loop_keeps_its_budget(
    defines: tuple[tuple[str, int], ...], short_budget: float, long_budget: float, tmp_path: Path
) -> None:
    loops = inner_loops(*defines, folder=tmp_path)
    by_kind = {(is_float, is_long): cost for is_float, is_long, cost in loops}
    assert by_kind[False, False] <= short_budget
    assert by_kind[False, True] <= long_budget


def test_nothing_goes_to_local_memory(tmp_path: Path) -> None:
    variant = Variant("moe_wint2", (("GATED", 0), ("WARPS_K", 4), ("ROWS", 8), ("STAGES", 3)))
    code = sass.disassemble(compile_cubin(variant, "sm_90a").code, tmp_path)
    assert not NAMES & sass.opcodes(code).keys()
