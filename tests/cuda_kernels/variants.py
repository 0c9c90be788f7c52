"""Every variant of every kernel that an op may ask for."""

from cuda_kernels.build import Variant
from cuda_kernels.moe_wint2 import projection_variants

ALL_VARIANTS: tuple[Variant, ...] = (Variant("routing"), *projection_variants())
