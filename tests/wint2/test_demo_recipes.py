"""What the demo's recipes are calibrated and judged on."""

import pytest

from wint2.demo import build


@pytest.mark.parametrize("name", build.RECIPES)
def test_no_window_is_fitted_and_judged(name):
    demo = build.RECIPES[name]
    fitted, held_out = build._drawn(list(range(70_000)), demo)
    assert fitted.shape == (demo.num_windows, demo.window)
    assert held_out.numel() == build.HELD_OUT_TOKENS
    assert not set(fitted.flatten().tolist()) & set(held_out.flatten().tolist())
