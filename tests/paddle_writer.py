"""Paddle's `-2Bits-` checkpoints byte by byte, out of the format's formulas: whole, or cut into rank folders.

Nothing here is the project's: numpy, and the safetensors layout by hand. Weights are random levels and
scales, so that what a file means is known exactly, without any quantizer.
"""

import json
import math
from pathlib import Path

import numpy as np

M8 = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
M4 = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
LABELS = {"uint8": "U8", "int8": "I8", "float32": "F32", "uint16": "U16"}  # bfloat16 is labelled U16


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    return from_bf16(to_bf16(values))


def pack_wint8(levels_KN: np.ndarray) -> np.ndarray:
    num_rows, num_columns = levels_KN.shape
    k, n = np.meshgrid(np.arange(num_rows), np.arange(num_columns), indexing="ij")
    kk = np.array(M8)[k % 16] + 16 * (k // 16)
    packed = np.zeros(num_rows * num_columns, np.uint8)
    packed[kk % 64 + kk // 64 * 128 + 64 * (n % 2) + 2 * num_rows * (n // 2)] = levels_KN + 128
    return packed.view(np.int8).reshape(num_columns, num_rows)


def pack_wint4(levels_KN: np.ndarray) -> np.ndarray:
    num_rows, num_columns = levels_KN.shape
    packed = np.zeros(num_rows * num_columns // 2, np.uint8)
    k, n = np.meshgrid(np.arange(0, num_rows, 2), np.arange(num_columns), indexing="ij")
    kb = k // 2
    kk = np.array(M4)[kb % 16] + 16 * (kb // 16)
    nibbles = levels_KN + 8
    pair = nibbles[0::2] | nibbles[1::2] << 4
    packed[kk % 32 + kk // 32 * 128 + 32 * (n % 4) + 2 * num_rows * (n // 4)] = pair
    words = packed.view(np.uint32)
    mixed = sum(((words >> (4 * source)) & 15) << (4 * place) for place, source in enumerate(NIBBLES))
    return np.asarray(mixed, np.uint32).view(np.int8).reshape(num_columns // 2, num_rows)


def true_row(slot: int) -> int:
    """Of the newer files: slot 16a + 2b + c of a 64-group holds row 8b + 2a + c."""
    a, b, c = slot % 64 // 16, slot % 16 // 2, slot % 2
    return slot // 64 * 64 + 8 * b + 2 * a + c


class Writer:
    """Draws projections; a drawn one is its tensors by suffix, and the weight [K, N] that they mean."""

    def __init__(self, seed: int, is_shuffled: bool = True) -> None:
        self._random = np.random.default_rng(seed)
        self._is_shuffled = is_shuffled

    def floats(self, *shape: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        bits = to_bf16(self._random.normal(0, shape[0] ** -0.5, shape))
        return {"weight": bits}, from_bf16(bits)

    def wint8(self, num_rows: int, num_columns: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        levels = self._random.integers(-127, 128, (num_rows, num_columns))
        scale = to_bf16(self._random.uniform(0.5, 1.5, num_columns) / 70 * num_rows**-0.5)
        meant = rounded(levels * from_bf16(scale))
        return {"quant_weight": pack_wint8(levels), "weight_scale": scale}, meant

    def wint4(self, num_rows: int, num_columns: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        levels = self._random.integers(-7, 8, (num_rows, num_columns)).astype(np.uint8).view(np.int8)
        scale = to_bf16(self._random.uniform(0.5, 1.5, num_columns) / 4 * num_rows**-0.5)
        meant = rounded(levels * from_bf16(scale))
        return {"quant_weight": pack_wint4(levels.astype(np.int64)), "weight_scale": scale}, meant

    def wint2(self, num_rows: int, num_columns: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        draw, columns = self._random, (num_columns,)
        codes = draw.integers(0, 256, (num_rows // 4, num_columns)).astype(np.uint8)
        local = draw.integers(0, 256, (num_rows // 128, num_columns)).astype(np.uint8)
        scale = draw.integers(100, 129, columns).astype(np.float32)  # whole: no rounding to dispute
        zero = draw.integers(0, 100, columns).astype(np.float32)
        super_scale = to_bf16(draw.uniform(0.5, 1.5, columns) / 160 * num_rows**-0.5)
        c = np.floor(codes * scale + zero + 0.5).astype(np.int64)
        fields = np.stack([(c >> shift & 63) - 32 for shift in (9, 6, 3, 0)], axis=1).reshape(num_rows, -1)
        nibbles = np.stack([local >> 4, local & 15], axis=1).reshape(-1, num_columns)
        slots = rounded(fields * rounded(nibbles * from_bf16(super_scale)).repeat(64, axis=0))
        meant = np.empty_like(slots)
        rows = [true_row(slot) if self._is_shuffled else slot for slot in range(num_rows)]
        meant[rows] = slots
        names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
        return dict(zip(names, (codes, local, super_scale, scale, zero), strict=True)), meant


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """u64 length | JSON header | bytes."""
    header, begin = {"__metadata__": {"format": "np"}}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        label, shape = LABELS[str(tensor.dtype)], list(tensor.shape)
        header[name] = {"dtype": label, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def projections(config: dict) -> dict[str, tuple[str, int, tuple[int, ...], str]]:
    """Every projection's format, inputs, sections of outputs, and the side that ranks cut, by name."""
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    dense, inner = config["intermediate_size"], config["moe_intermediate_size"]
    found = {}
    last_wint4 = config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"ernie.layers.{layer}."
        found[f"{stem}self_attn.qkv_proj"] = "wint8", hidden, (query, key, key), "outputs"
        found[f"{stem}self_attn.o_proj"] = "wint8", query, (hidden,), "inputs"
        is_moe = layer >= config["moe_layer_start_index"]
        names = [f"experts.{e}." for e in range(config["moe_num_experts"])] if is_moe else [""]
        form = ("wint4" if layer <= last_wint4 else "wint2") if is_moe else "wint8"
        width = inner if is_moe else dense
        for name in names:
            found[f"{stem}mlp.{name}up_gate_proj"] = form, hidden, (width, width), "outputs"
            found[f"{stem}mlp.{name}down_proj"] = form, width, (hidden,), "inputs"
    return found


def write_2bits(
    path: Path, config: dict, num_ranks: int = 1, is_shuffled: bool = True
) -> dict[str, np.ndarray]:
    """A folder of one file, or rank0/, rank1/, ...; returns what every projection means, float32 [K, N]."""
    meant: dict[str, list[np.ndarray]] = {}
    for rank in range(num_ranks):
        folder = path / f"rank{rank}" if num_ranks > 1 else path
        folder.mkdir(parents=True, exist_ok=True)
        tensors = _shared_tensors(config, rank, num_ranks)
        writer = Writer(rank, is_shuffled)
        for name, (form, inputs, sections, side) in projections(config).items():
            rows = inputs // num_ranks if side == "inputs" else inputs
            columns = sum(sections) // (num_ranks if side == "outputs" else 1)
            parts, weight = getattr(writer, form)(rows, columns)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
            meant.setdefault(name, []).append(weight)
        write_safetensors(folder / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    table = projections(config)
    return {name: _joined(parts, *table[name][2:]) for name, parts in meant.items()}


def _shared_tensors(config: dict, rank: int, num_ranks: int) -> dict[str, np.ndarray]:
    """Embedding, norms and routers; the vocabulary is cut."""
    hidden, experts = config["hidden_size"], config["moe_num_experts"]
    words = config["vocab_size"] // num_ranks
    writer = Writer(1000)
    whole = writer.floats(hidden, config["vocab_size"])[0]["weight"].T
    tensors = {"ernie.embed_tokens.weight": np.ascontiguousarray(whole[rank * words : (rank + 1) * words])}
    tensors["ernie.norm.weight"] = to_bf16(np.ones(hidden))
    for layer in range(config["num_hidden_layers"]):
        stem = f"ernie.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{norm}.weight"] = to_bf16(np.ones(hidden))
        if layer >= config["moe_layer_start_index"]:
            router = np.random.default_rng(layer).normal(0, 1, (hidden, experts)) / math.sqrt(hidden)
            tensors[f"{stem}mlp.gate.weight"] = router.astype(np.float32)
            bias = np.zeros((1, experts), np.float32)
            tensors[f"{stem}mlp.moe_statics.e_score_correction_bias"] = bias
    return tensors


def _joined(parts: list[np.ndarray], sections: tuple[int, ...], side: str) -> np.ndarray:
    if side == "inputs":
        return np.concatenate(parts)
    bounds = np.cumsum([size // len(parts) for size in sections])[:-1]
    by_rank = [np.split(part, bounds, axis=1) for part in parts]
    return np.concatenate([one[index] for index in range(len(sections)) for one in by_rank], axis=1)
