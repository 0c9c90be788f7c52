"""Looks up a model's tensors in a checkpoint of either layout, and collects what is wrong or left over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpu_worker.config import QuantFormat
from gpu_worker.model.checkpoint import Checkpoint, Tensors
from gpu_worker.model.errors import CheckpointError
from gpu_worker.model.families.ernie import ERNIE
from gpu_worker.model.families.family import Family
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.model.stored_weight import (
    FLOATS,
    Cut,
    Expected,
    Kind,
    RotaryHalves,
    StoredLinear,
    StoredVector,
    expected_tensors,
    stored_format,
    tensor_problem,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a family of checkpoints names and orients its tensors."""

    name: str
    prefix: str
    qkv: tuple[str, ...]
    up_gate: tuple[str, ...]
    is_in_out: bool  # linears are stored [in, out]


HUGGING_FACE = Layout(
    "Hugging Face", "model.", ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), False
)
PADDLE = Layout("Paddle", "ernie.", ("qkv_proj",), ("up_gate_proj",), True)


def detect_layout(checkpoint: Checkpoint) -> Layout:
    """The layout, read off the names. Raises CheckpointError."""
    for layout in (HUGGING_FACE, PADDLE):
        if any(name.startswith(layout.prefix) for name in checkpoint.ranks[0]):
            return layout
    some = ", ".join(sorted(checkpoint.ranks[0])[:3]) or "none"
    raise CheckpointError(
        [f"{checkpoint.path}: no tensor is named model.* or ernie.*; the first are: {some}"]
    )


class TensorFinder:
    """Finds tensors by the name that follows the layout's prefix; `problems` grows, nothing is raised."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, family: Family = ERNIE) -> None:
        self.layout = layout
        self._family = family
        self.problems: list[str] = []
        self._ranks = checkpoint.ranks
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._ranks[0]

    @property
    def has_lm_head(self) -> bool:
        return "lm_head.weight" in self._ranks[0]

    def vector(self, name: str, kind: Kind, shape: tuple[int, ...], cut: Cut = "none") -> StoredVector:
        full = self._stored_name(name)
        if cut == "outputs":
            shape = (shape[0] // len(self._ranks), *shape[1:])
        found = [self._find(rank, {full: Expected(full, FLOATS, shape)}) for rank in self._ranks]
        return StoredVector(full, kind, tuple(tensors[full] for tensors in found if tensors), cut)

    def linear(self, name: str, kind: Kind, num_inputs: int, num_outputs: int, cut: Cut) -> StoredLinear:
        """A projection that every layout stores whole."""
        return self._linear((self._stored_name(name),), kind, num_inputs, (num_outputs,), cut)

    def fused(
        self, prefix: str, kind: Kind, parts: tuple[str, ...], num_inputs: int, sections: tuple[int, ...]
    ) -> StoredLinear:
        """A projection that Paddle stores whole and Hugging Face in parts, one for each of its sections."""
        stems = tuple(self._stored_name(prefix + part) for part in parts)
        return self._linear(stems, kind, num_inputs, sections, "outputs")

    def qkv(self, prefix: str, head_dim: int, num_inputs: int, sections: tuple[int, ...]) -> StoredLinear:
        """The fused q, k and v projection, its rotary pairs side by side."""
        found = self.fused(prefix, "attention", self.layout.qkv, num_inputs, sections)
        return replace(found, halves=self._halves(head_dim, sum(sections[:2])))

    def qkv_bias(self, prefix: str, head_dim: int, sections: tuple[int, ...]) -> StoredVector:
        names = [self._stored_name(f"{prefix}{part}.bias") for part in self.layout.qkv]
        sizes = sections if len(names) > 1 else (sum(sections),)
        expected = {name: Expected(name, FLOATS, (n,)) for name, n in zip(names, sizes, strict=True)}
        found = tuple(self._find(self._ranks[0], expected).values())
        return StoredVector(
            names[0], "attention", found, "outputs", self._halves(head_dim, sum(sections[:2]))
        )

    def correction_bias(self, name: str, num_experts: int) -> StoredVector:
        """[1, E] in ERNIE's files, [E] in others."""
        is_row = self._family is ERNIE or self.layout is PADDLE
        return self.vector(name, "router", (1, num_experts) if is_row else (num_experts,))

    def qk_norm(self, name: str, head_dim: int, size: int) -> StoredVector:
        """The weight of a norm of queries or keys, in the order of their projection."""
        return replace(self.vector(name, "norms", (size,)), halves=self._halves(head_dim, size))

    def _halves(self, head_dim: int, num_rows: int) -> RotaryHalves | None:
        has_halves = self._family.has_rotary_halves and self.layout is HUGGING_FACE
        return RotaryHalves(head_dim, num_rows) if has_halves else None

    def _stored_name(self, name: str) -> str:
        """Our own files have our names, whatever the family."""
        is_ours = self.layout is PADDLE
        return self.layout.prefix + (name if is_ours else self._family.stored_name(name))

    def lm_head(self, num_inputs: int, num_outputs: int) -> StoredLinear:
        """The head, whose name has no prefix."""
        return self._linear(("lm_head",), "head", num_inputs, (num_outputs,), "outputs")

    def notes(self) -> tuple[str, ...]:
        """What the checkpoint has beyond the model, one line a kind."""
        left = {name for rank in self._ranks for name in rank} - self._used
        mtp = {name for name in left if re.search(r"\bmtp_", name)}
        notes = [f"{len(mtp)} tensors of the multi-token-prediction block skipped"] if mtp else []
        others = sorted(left - mtp)
        if others:
            some = ", ".join(others[:5])
            notes.append(f"{len(others)} tensors are unknown to this model and were skipped: {some}, ...")
        return tuple(notes)

    def _linear(
        self, stems: tuple[str, ...], kind: Kind, num_inputs: int, sections: tuple[int, ...], cut: Cut
    ) -> StoredLinear:
        count = len(self._ranks)
        rank_inputs = num_inputs // count if cut == "inputs" else num_inputs
        rank_sections = tuple(size // count for size in sections) if cut == "outputs" else sections
        quant_format = self._format(stems[0], kind, sum(rank_sections))
        expected = self._expected(stems, quant_format, rank_inputs, rank_sections)
        ranks = tuple(self._find(tensors, expected) for tensors in self._ranks)
        is_in_out = self.layout.is_in_out
        return StoredLinear(stems[0], kind, quant_format, is_in_out, num_inputs, sections, cut, ranks)

    def _format(self, stem: str, kind: Kind, num_outputs: int) -> QuantFormat:
        return stored_format(self._ranks[0], stem, num_outputs)

    def _expected(
        self, stems: tuple[str, ...], quant_format: QuantFormat, num_inputs: int, sections: tuple[int, ...]
    ) -> dict[str, Expected]:
        if quant_format != "none":
            return expected_tensors(stems[0], quant_format, num_inputs, sum(sections))
        outputs = sections if len(stems) > 1 else (sum(sections),)
        shapes = [(num_inputs, n) if self.layout.is_in_out else (n, num_inputs) for n in outputs]
        return {
            stem: Expected(f"{stem}.weight", FLOATS, shape) for stem, shape in zip(stems, shapes, strict=True)
        }

    def _find(self, tensors: Tensors, expected: Mapping[str, Expected]) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for key, want in expected.items():
            tensor = tensors.get(want.name)
            problem = f"{want.name}: missing" if tensor is None else tensor_problem(tensor, want)
            self._used.add(want.name)
            if problem:
                self.problems.append(problem)
            elif tensor is not None:
                found[key] = tensor
        return found
