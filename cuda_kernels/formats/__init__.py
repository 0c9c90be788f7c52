"""The weight formats: one module each, all in plain vectorised torch, on whatever device the tensors live."""

from cuda_kernels.formats import wint2, wint2t, wint4, wint8, wint25, wint275

__all__ = ["wint2", "wint2t", "wint4", "wint8", "wint25", "wint275"]
