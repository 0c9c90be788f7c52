"""Every format against known answers made by an independent decoder, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cuda_kernels.formats import wint2, wint4, wint8, wint25, wint275

_VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "formats.npz")


def _bf16(name: str) -> torch.Tensor:
    return torch.from_numpy(_VECTORS[name].view(np.int16)).view(torch.bfloat16)


def _bits(tensor: torch.Tensor) -> NDArray[np.uint16]:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("k_order", ["natural", "shuffled"])
@pytest.mark.parametrize("rounding", ["bf16", "fp32"])
def test_wint2(case: str, k_order: str, rounding: str) -> None:
    tensor = {n: torch.from_numpy(_VECTORS[f"wint2.{case}.{n}"]) for n in ("quant_weight", "weight_scale")}
    scale, zp = (torch.from_numpy(_VECTORS[f"wint2.{case}.{n}"]) for n in ("code_scale", "code_zp"))
    super_scales = _bf16(f"wint2.{case}.super_scales_bf16bits")
    weight = wint2.dequantize(
        *tensor.values(), super_scales, scale, zp, k_order=k_order, scale_rounding=rounding
    )
    expected = _VECTORS[f"wint2.{case}.expected_{k_order}_{rounding}_bf16bits"]
    np.testing.assert_array_equal(_bits(weight), expected)


def test_wint25() -> None:
    words = torch.from_numpy(_VECTORS["wint25.words"].view(np.int16))
    weight = wint25.dequantize(words, _bf16("wint25.super_scale_bf16bits"))
    expected = torch.from_numpy(_VECTORS["wint25.expected_f64"]).float()  # exact: 24 significant bits
    assert torch.equal(weight, expected.bfloat16())


def test_wint275() -> None:
    packed = torch.from_numpy(_VECTORS["wint275.bytes"])
    weight = wint275.dequantize(packed, _bf16("wint275.super_scale_bf16bits"))
    expected = torch.from_numpy(_VECTORS["wint275.expected_f64"]).float()
    assert torch.equal(weight, expected.bfloat16())


@pytest.mark.parametrize(("module", "name"), [(wint8, "wint8"), (wint4, "wint4")])
def test_paddle_layout_both_ways(module: object, name: str) -> None:
    levels, packed = (torch.from_numpy(_VECTORS[f"{name}.{part}"]) for part in ("q", "packed"))
    assert torch.equal(module.pack(levels), packed)
    assert torch.equal(module.unpack(packed), levels)
