"""Every op on a GPU against its CPU half or float64, and the same bits again from a CUDA graph."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from cuda_kernels import attention_kernels, kv_store, norm, rope, routing, tiled_linear
from cuda_kernels.launch import cuda_device
from cuda_kernels.tiled import Bits, TiledWeight, pack_tiled, stack_tiled, unpack_tiled
from tests.cuda_kernels.attention_cases import Lengths, case, expected
from tests.cuda_kernels.generators import packed_trellis

pytestmark = pytest.mark.gpu

BITS: tuple[Bits, ...] = (4, 8, 16)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    out, wanted = out.double().cpu(), wanted.double().cpu()
    return float((out - wanted).norm() / wanted.norm().clamp(min=1e-30))


def to_gpu(weight: TiledWeight) -> TiledWeight:
    tensors = {f.name: getattr(weight, f.name) for f in fields(weight)}
    return replace(weight, **{name: t.cuda() for name, t in tensors.items() if isinstance(t, Tensor)})


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


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 8192), (65, 576), (3, 8200)])
def test_norm(num_tokens: int, width: int) -> None:
    x, residual, scale = torch.randn(3, num_tokens, width).bfloat16().unbind()
    wanted = norm.add_rms_norm(x, residual, scale[0], 1e-5)
    out = norm.add_rms_norm(x.cuda(), residual.cuda(), scale[0].cuda(), 1e-5)
    assert relative_error(out[0], wanted[0]) < 1e-3
    assert torch.equal(out[1].cpu(), wanted[1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_and_kv_store(head_dim: int) -> None:
    projected = torch.randn(7, 9 + 3 + 3, head_dim).bfloat16()
    table, positions = rope.cos_sin_table(5000, head_dim, 5e5), torch.randint(0, 5000, (7,))
    slots = torch.randperm(64)[:7]
    slots[3] = -1
    caches = []
    for device in ("cpu", "cuda"):
        query, key, value = projected.to(device).split([9, 3, 3], dim=1)
        query, key = rope.rope(query, key, positions.to(device), table.to(device))
        cache = torch.zeros(2, 4, 16, 3, head_dim, dtype=torch.bfloat16, device=device)
        kv_store.kv_store(key, value, cache[0], cache[1], slots.to(device))
        caches += [cache, query]
    assert relative_error(caches[2], caches[0]) < 1e-3
    assert relative_error(caches[3], caches[1]) < 1e-3


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 64), (130, 64), (9, 8), (5, 300)])
def test_route(num_tokens: int, num_experts: int) -> None:
    logits, bias = torch.randn(num_tokens, num_experts) * 3, torch.randn(num_experts) * 0.01
    ids, weights = routing.route(logits.cuda(), bias.cuda(), 8, 1e-12)
    wanted_ids, wanted_weights = routing.route(logits, bias, 8, 1e-12)
    assert torch.equal(ids.cpu(), wanted_ids)
    torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 32, 64, 200])
def test_tiled_linear(bits: Bits, is_gated: bool, num_tokens: int) -> None:
    packed, x = weight(1032, 2568, bits, is_gated), torch.randn(num_tokens, 2568).bfloat16()
    out = tiled_linear.tiled_linear(x.cuda(), to_gpu(packed))
    assert relative_error(out, tiled_linear.tiled_linear(x, packed)) < 6e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_untile(bits: Bits) -> None:
    packed = weight(200, 1096, bits)
    out = tiled_linear.launch_untile(cuda_device(0), to_gpu(packed))
    assert torch.equal(out.cpu(), unpack_tiled(packed).bfloat16())


@pytest.mark.parametrize("bits", [2, *BITS])
@pytest.mark.parametrize("num_tokens", [1, 40, 300])
def test_experts(bits: Bits, num_tokens: int) -> None:
    up_gate = stack_tiled([weight(272, 520, bits, True) for _ in range(8)])
    down = stack_tiled([weight(520, 136, bits) for _ in range(8)])
    x = torch.randn(num_tokens, 520).bfloat16()
    ids = torch.rand(num_tokens, 8).argsort(1)[:, :3].int().contiguous()
    weights = torch.rand(num_tokens, 3)
    out = tiled_linear.moe_tiled(x.cuda(), ids.cuda(), weights.cuda(), to_gpu(up_gate), to_gpu(down))
    assert relative_error(out, tiled_linear.moe_tiled(x, ids, weights, up_gate, down)) < 3e-3


@pytest.mark.parametrize(("heads", "head_dim"), [((64, 8), 128), ((20, 4), 128), ((9, 3), 64)])
@pytest.mark.parametrize(
    "lengths",
    [((1, 1),), ((1, 5000), (1, 17), (1, 300)), ((700, 700),), ((30, 1000), (1, 5), (129, 400))],
    ids=["one token", "decode", "prefill", "mixed"],
)
def test_attention(heads: tuple[int, int], head_dim: int, lengths: Lengths) -> None:
    of = case(lengths, heads, head_dim, block_size=64)
    on = of.to("cuda")
    out = attention_kernels.launch_attention(cuda_device(0), on.query, on.step, on.max_query_len, on.scale)
    assert relative_error(out, expected(of)) < 4e-3


def replayed(op: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What the op gives at once, and what a graph of it gives after its result was cleared."""
    eager = op().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return eager, captured


def test_graphs_replay_the_same_bits() -> None:
    packed, x = to_gpu(weight(512, 1024, 8)), torch.randn(5, 1024, device="cuda").bfloat16()
    of = case(((1, 900), (1, 20)), (64, 8), 128, block_size=64).to("cuda")
    scale = torch.randn(1024, device="cuda").bfloat16()
    ops: list[Callable[[], Tensor]] = [
        lambda: norm.rms_norm(x, scale, 1e-5),
        lambda: tiled_linear.tiled_linear(x, packed),
        lambda: attention_kernels.launch_attention(cuda_device(0), of.query, of.step, 1, of.scale),
    ]
    for op in ops:
        eager, captured = replayed(op)
        assert torch.equal(eager, captured)
