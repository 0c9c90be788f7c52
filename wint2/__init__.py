"""The face of the project: `from wint2 import LLM, SamplingParams, StructuredOutput`.

They are imported when first asked for, so that the services and the command line, which live in this
distribution too, never load torch for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_worker.llm import LLM
    from gpu_worker.sampling_params import SamplingParams, StructuredOutput

__all__ = ["LLM", "SamplingParams", "StructuredOutput"]

_HOMES = {
    "LLM": "gpu_worker.llm",
    "SamplingParams": "gpu_worker.sampling_params",
    "StructuredOutput": "gpu_worker.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
