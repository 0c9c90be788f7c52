"""Kernels of WINT2 experts that stand for all that an op may ask for: the smallest and the largest tiles."""

from cuda_kernels.build import Variant
from cuda_kernels.expert_batch import batch_variants
from cuda_kernels.expert_gemm import gemm_variants
from cuda_kernels.moe_wint2 import projection_variants

_DECODE = projection_variants()
_GEMM = [variant for variant in gemm_variants() if ("GATED", 1) in variant.defines]
# For the architecture that has instructions of its own for them, or is enough for the smallest tile.
HOPPER = (_DECODE[0], *(variant for variant in _GEMM if ("TOKENS", 128) in variant.defines))
REPRESENTATIVE = (
    Variant("routing"),
    _DECODE[-1],
    *batch_variants(),
    *(variant for variant in _GEMM if ("TOKENS", 64) in variant.defines),
    *HOPPER,
)
