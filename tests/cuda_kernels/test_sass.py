"""Instructions a weight in the decode kernel's inner loops, counted in the machine code, against a budget.

An H100 issues 128 lane-instructions a clock and SM and must decode 50 weights a clock and SM to keep up
with the 3.0 TB/s at which it copies: 2.5 instructions a weight if every slot were used. The method's own
arithmetic (float code, scale in the weight, bfloat) takes 3.7 in such a loop.
"""

from collections import Counter
from pathlib import Path

import pytest

from cuda_kernels.build import Variant, compile_cubin
from tests.cuda_kernels import sass

COPIES_PER_STEP, WEIGHTS_PER_STEP = 3, 2 * 16 * 128 // 32  # of one lane
NAMES = {"LDL", "STL"}


def inner_loops(stem: str, defines: dict[str, int], folder: Path) -> dict[tuple[int, str], float]:
    """Instructions a weight of each loop over steps, by its columns of halves (0: int8) and its kind."""
    variant = Variant(stem, (("GATED", 1), ("STAGES", 3), *defines.items()))
    found = {}
    for loop in sass.loops(sass.disassemble(compile_cubin(variant, "sm_90a").code, folder)):
        count = sass.opcodes(loop)
        if (count["HMMA"] or count["IMMA"]) and not count["BAR"] and not count["BSSY"]:
            weights = count["LDGSTS"] // COPIES_PER_STEP * WEIGHTS_PER_STEP
            found[count["HMMA"] * 8 // weights, kind_of(count, weights)] = len(loop) / weights
    return found


def kind_of(count: Counter[str], weights: int) -> str:
    """By what a code, four weights, takes more than one: two multiplications, or a sum of floats."""
    if count["FRND"]:
        return "wide float"
    if count["FADD"] > 0.3 * weights:
        return "float"
    multiplied = count["IMAD"] + count["IDP"]  # 5/16 are local scales or shifts
    return "long" if multiplied > (0.7 if count["IMMA"] else 0.55) * weights else "short"


@pytest.mark.parametrize("warps_k", [1, 8])
def test_inner_loops_keep_their_budgets(warps_k: int, tmp_path: Path) -> None:
    loops = inner_loops("moe_wint2", {"WARPS_K": warps_k, "ROWS": 8, "PIECES": 4}, tmp_path)
    assert loops[0, "short"] <= 1.5
    assert loops[0, "long"] <= 1.75
    assert loops[0, "float"] <= 2.35
    assert loops[1, "short"] <= 1.6
    assert loops[1, "long"] <= 1.85
    assert loops[1, "float"] <= 2.7


def test_bfloat_keeps_its_budget(tmp_path: Path) -> None:
    defines = {"WARPS_K": 1, "ROWS": 8, "PIECES": 0, "WINT2_BFLOAT": 1}
    loops = inner_loops("moe_wint2", defines, tmp_path)
    assert loops[1, "short"] <= 1.95
    assert loops[1, "long"] <= 2.2


def test_sixteen_tokens_cost_a_quarter_more_than_eight(tmp_path: Path) -> None:
    loops = inner_loops("expert_batch", {"WARPS_K": 1, "ROWS": 16}, tmp_path)
    assert loops[1, "short"] <= 1.6
    assert loops[2, "short"] <= 2.0
    assert loops[2, "long"] <= 2.25


def test_nothing_goes_to_local_memory(tmp_path: Path) -> None:
    defines = {"GATED": 0, "WARPS_K": 4, "ROWS": 8, "STAGES": 3, "PIECES": 4}
    variant = Variant("moe_wint2", tuple(defines.items()))
    code = sass.disassemble(compile_cubin(variant, "sm_90a").code, tmp_path)
    assert not NAMES & sass.opcodes(code).keys()
