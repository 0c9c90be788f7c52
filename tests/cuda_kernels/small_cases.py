"""Every kernel on a small shape with its expected result, for any `launch.Device`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from cuda_kernels import attention_kernels, kv_store, norm, rope, routing, sampling, tiled_linear
from cuda_kernels.build import Variant
from cuda_kernels.launch import Argument, Device, Grid
from cuda_kernels.moe_wint2 import launch_moe_wint2, moe_wint2
from cuda_kernels.tiled import Bits, TiledWeight, pack_tiled, stack_tiled, unpack_tiled
from tests.cuda_kernels.attention_cases import Lengths, case, expected, store
from tests.cuda_kernels.generators import Layer, layer, packed_trellis

BITS: tuple[Bits, ...] = (4, 8, 16)
MIXED: Lengths = ((30, 100), (1, 5), (1, 300), (2, 2))


@dataclass(frozen=True)
class Case:
    """`launch(device, place)` runs on tensors brought to `place`; its result is to be near `expected()`."""

    name: str
    launch: Callable[[Device, str], Tensor]
    expected: Callable[[], Tensor]
    tolerance: float = 1e-2


class Watched:
    """A device of few multiprocessors, so that few CTAs have much to do, which notes what it launches."""

    num_multiprocessors = 3

    def __init__(self, device: Device | None, shared_bytes: int = 232448) -> None:
        self.shared_bytes = shared_bytes
        self.has_warpgroup_products = device is None or device.has_warpgroup_products
        self.launched: list[tuple[Variant, str]] = []
        self._device = device

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        *,
        overlaps: bool = False,
    ) -> None:
        self.launched.append((variant, kernel))
        if self._device:
            self._device.launch(variant, kernel, grid, threads, shared_bytes, arguments, overlaps=overlaps)

    def with_shared_bytes(self, shared_bytes: int) -> Watched:
        """The same with less shared memory."""
        other = Watched(self._device, shared_bytes)
        other.launched = self.launched
        return other

    def without_warpgroups(self) -> Watched:
        """The same before Hopper."""
        other = self.with_shared_bytes(self.shared_bytes)
        other.has_warpgroup_products = False
        return other


def cases() -> list[Case]:
    torch.manual_seed(0)
    return [*wint2_cases(), *tiled_cases(), *attention_cases(), *small_op_cases()]


def wint2_cases() -> list[Case]:
    crowded = layer(20, 6, 1, 256, 136, k_order="natural")
    crowded.expert_ids.zero_()
    uneven = layer(2, 16, 4, 256, 256, kind="grid")
    uneven.hidden[0, ::128] = 1000  # not for int8 pieces
    few = {
        "1 token": layer(1, 2, 1, 128, 128, k_order="natural"),
        "2 tokens, many pairs": uneven,
        "3 tokens, padded K": layer(3, 4, 2, 576, 128, kind="grid"),
        "3 tokens, float codes": layer(3, 4, 2, 256, 136, kind="extreme", seed=3),
        "8 tokens": layer(8, 8, 2, 256, 200),
        "44 tokens, sorted before": layer(44, 36, 3, 256, 48),
        "20 tokens, one expert": crowded,
    }
    found = [wint2_case(name, given) for name, given in few.items()]
    found.append(wint2_case("5 tokens, K in passes", layer(5, 4, 3, 640, 136), shared_bytes=102_000))
    for kind in ("any", "grid", "extreme"):
        found.append(wint2_case(f"23 tokens, {kind}", layer(23, 4, 2, 640, 72, kind=kind)))
        found.append(wint2_case(f"99 tokens, {kind}", layer(99, 4, 1, 192, 72, kind=kind)))
    wide = layer(150, 4, 2, 256, 136, kind="grid")
    found += [wint2_case("150 tokens", wide), wint2_case("150 tokens, before Hopper", wide, is_old=True)]
    found.append(wint2_case("180 tokens", layer(180, 4, 1, 256, 72)))
    return found


def wint2_case(name: str, given: Layer, *, shared_bytes: int = 232448, is_old: bool = False) -> Case:
    def launch(device: Device, place: str) -> Tensor:
        assert isinstance(device, Watched)
        on = device.with_shared_bytes(shared_bytes)
        on = on.without_warpgroups() if is_old else on
        return launch_moe_wint2(on, *(argument.to(place) for argument in given.arguments))

    return Case(f"wint2: {name}", launch, lambda: moe_wint2(*given.arguments), 3e-3)


def tiled_cases() -> list[Case]:
    found = []
    for bits in BITS:
        for num_tokens, is_gated in ((1, False), (9, True), (20, False), (70, True)):
            found.append(linear_case(bits, num_tokens, weight(104, 200, bits, is_gated)))
        found.append(linear_case(bits, 60, weight(72, 200, bits)))
        found += [experts_case(bits, num_tokens) for num_tokens in (1, 21)]
    found += [experts_case(2, num_tokens) for num_tokens in (1, 21)]
    return found + [untile_case(weight(88, 200, bits)) for bits in BITS[:2]]


def linear_case(bits: Bits, num_tokens: int, packed: TiledWeight) -> Case:
    x = torch.randn(num_tokens, packed.num_inputs).bfloat16()
    return Case(
        f"linear of {bits} bits, {num_tokens} tokens",
        lambda device, place: tiled_linear.launch_tiled_linear(device, x.to(place), moved(packed, place)),
        lambda: tiled_linear.tiled_linear(x, packed),
    )


def experts_case(bits: Bits, num_tokens: int) -> Case:
    up_gate = stack_tiled([weight(144, 136, bits, True) for _ in range(4)])
    down = stack_tiled([weight(136, 72, bits) for _ in range(4)])
    x, shares = torch.randn(num_tokens, 136).bfloat16(), torch.rand(num_tokens, 2)
    ids = torch.rand(num_tokens, 4).argsort(1)[:, :2].int().contiguous()
    return Case(
        f"experts of {bits} bits, {num_tokens} tokens",
        lambda device, place: tiled_linear.launch_moe_tiled(
            device, x.to(place), ids.to(place), shares.to(place), moved(up_gate, place), moved(down, place)
        ),
        lambda: tiled_linear.moe_tiled(x, ids, shares, up_gate, down),
    )


def untile_case(packed: TiledWeight) -> Case:
    return Case(
        f"untile {packed.bits} bits",
        lambda device, place: tiled_linear.launch_untile(device, moved(packed, place)),
        lambda: unpack_tiled(packed).bfloat16(),
    )


def weight(num_outputs: int, num_inputs: int, bits: Bits, is_gated: bool = False) -> TiledWeight:
    if bits == 2:
        return packed_trellis(num_outputs, num_inputs, is_gated)
    if bits == 16:
        dense = torch.randn(num_outputs, num_inputs) * num_inputs**-0.5
        return pack_tiled(dense.bfloat16(), bits=16, is_gated=is_gated)
    limit = 2 ** (bits - 1) - 1
    levels = torch.randint(-limit, limit + 1, (num_outputs, num_inputs), dtype=torch.int8)
    scale = torch.rand(num_outputs) / limit * num_inputs**-0.5
    return pack_tiled(levels, scale.bfloat16(), bits=bits, is_gated=is_gated)


def moved(packed: TiledWeight, place: str) -> TiledWeight:
    tensors = {f.name: getattr(packed, f.name) for f in fields(packed)}
    return replace(packed, **{name: t.to(place) for name, t in tensors.items() if isinstance(t, Tensor)})


def attention_cases() -> list[Case]:
    found = []
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        found += [attention_case(MIXED, heads, dim, dtype) for heads, dim in (((9, 3), 64), ((16, 2), 128))]
    found.append(attention_case(MIXED, (16, 2), 128, torch.bfloat16, is_old=True))
    return [*found, attention_case(((1, 700), (1, 17)), (8, 1), 64, torch.bfloat16)]


def attention_case(
    lengths: Lengths, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, *, is_old: bool = False
) -> Case:
    given = case(lengths, heads, head_dim, 32, dtype=dtype)

    def launch(device: Device, place: str) -> Tensor:
        assert isinstance(device, Watched)
        on, of = device.without_warpgroups() if is_old else device, given.to(place)
        return attention_kernels.launch_attention(on, of.query, of.step, of.max_query_len, of.scale)

    age = " before Hopper" if is_old else ""
    return Case(f"attention{age}, {heads} heads of {head_dim}, {dtype}", launch, lambda: expected(given))


def small_op_cases() -> list[Case]:
    stores = [store_case(dtype) for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn)]
    found = [norm_case(3, 576), norm_case(1, 8200), rope_case(), *stores, route_case()]
    found += [router_case(num_tokens) for num_tokens in (3, 11)]
    return [*found, draw_case(300), draw_case(9000), penalise_case(), forbid_case()]


def norm_case(num_tokens: int, width: int) -> Case:
    x, residual, scale = torch.randn(3, num_tokens, width).bfloat16().unbind()
    return Case(
        f"norm of {width}",
        lambda device, place: torch.cat(
            norm.launch_rms_norm(device, x.to(place), residual.to(place), scale[0].to(place), 1e-5)
        ),
        lambda: torch.cat(norm.add_rms_norm(x, residual, scale[0], 1e-5)),
    )


def rope_case() -> Case:
    heads, table = torch.randn(7, 15, 64).bfloat16(), rope.cos_sin_table(50, 64, 1e4)
    positions = torch.arange(7) * 7

    def launch(device: Device, place: str) -> Tensor:
        own = heads.clone().to(place)
        query, key, _ = own.split([9, 3, 3], dim=1)
        rope.launch_rope(device, query, key, positions.to(place), table.to(place))
        return own[:, :12]

    def wanted() -> Tensor:
        query, key, _ = heads.clone().split([9, 3, 3], dim=1)
        return torch.cat(rope.rope(query, key, positions, table), dim=1)

    return Case("rope", launch, wanted)


def store_case(dtype: torch.dtype) -> Case:
    """Keys and values of five tokens, of which one is padding, as the cache's bytes."""
    key, value = torch.randn(5, 6, 64).bfloat16().split([3, 3], dim=1)
    slots = torch.tensor([3, -1, 0, 11, 7])

    def run(place: str, device: Device | None) -> Tensor:
        empty = [torch.zeros(2, 16, 3, 64).bfloat16() for _ in range(2)]
        stored, scales = store(empty, dtype)
        caches, k, v, where = [x.to(place) for x in stored], key.to(place), value.to(place), slots.to(place)
        levels = scales and type(scales)(*(x.to(place) for x in scales))
        if device is None:
            kv_store.kv_store(k, v, *caches, where, levels)
        elif levels is None:
            kv_store.launch_kv_store(device, k, v, *caches, where)
        else:
            kv_store.launch_store_levels(device, k, v, *caches, where, levels)
        return torch.stack(caches).cpu().float()

    return Case(f"kv store of {dtype}", lambda device, place: run(place, device), lambda: run("cpu", None))


def route_case() -> Case:
    logits, bias = torch.randn(9, 64) * 3, torch.randn(64) * 0.01
    return Case(
        "route",
        lambda device, place: routing.launch_route(device, logits.to(place), bias.to(place), 8, 1e-12)[1],
        lambda: routing.route(logits, bias, 8, 1e-12)[1],
    )


def router_case(num_tokens: int) -> Case:
    x, weight_ED, bias = torch.randn(num_tokens, 72).bfloat16(), torch.randn(42, 72) / 8, torch.zeros(42)

    def launch(device: Device, place: str) -> Tensor:
        inputs = x.to(place), weight_ED.to(place), bias.to(place)
        return routing.launch_router(device, *inputs, 3, 1e-12)[1]

    return Case(
        f"router of {num_tokens}", launch, lambda: routing.route(x.float() @ weight_ED.T, bias, 3, 1e-12)[1]
    )


def draw_case(width: int) -> Case:
    """The likeliest token, and draws that every kind of cut stands before."""
    logits = torch.randn(4, width) * 3
    wishes = sampling.Wishes(
        torch.tensor([0.0, 1.0, 0.7, 1.3]),
        torch.tensor([0, 0, 40, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.8, 0.9, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.05]),
    )
    uniform = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)

    def launch(device: Device, place: str) -> Tensor:
        on = sampling.Wishes(*(wish.to(place) for wish in wishes))
        return sampling.launch_draw(device, logits.to(place), on, uniform.to(place))[0]

    return Case(f"draw of {width}", launch, lambda: sampling.draw_plainly(logits, wishes, uniform)[0])


def penalise_case() -> Case:
    logits, divisor, loss = torch.randn(3, 5000), torch.rand(4, 5000) + 0.5, torch.rand(4, 5000)
    positions, rows = torch.tensor([2, 0]), torch.tensor([3, 1])

    def launch(device: Device, place: str) -> Tensor:
        own = logits.clone().to(place)
        others = (tensor.to(place) for tensor in (positions, rows, divisor, loss))
        sampling.launch_penalise(device, own, *others)
        return own

    def wanted() -> Tensor:
        own = logits.clone()
        sampling.penalise_plainly(own, positions, rows, divisor, loss)
        return own

    return Case("penalise", launch, wanted)


def forbid_case() -> Case:
    """Half of two rows' tokens; what is forbidden is counted, for no norm holds an infinity."""
    logits, positions = torch.randn(3, 5000), torch.tensor([2, 0])
    masks = torch.randint(-(2**31), 2**31, (2, 157), dtype=torch.int32)

    def run(place: str, forbid: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        own = logits.clone().to(place)
        forbid(own, positions.to(place), masks.to(place))
        return own.cpu().clamp(min=-10)

    return Case(
        "forbid",
        lambda device, place: run(place, partial(sampling.launch_forbid, device)),
        lambda: run("cpu", sampling.forbid_plainly),
    )
