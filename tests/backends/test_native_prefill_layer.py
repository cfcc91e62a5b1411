"""A whole layer in one call gives, to the bit, what its products and its attention give in turn."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import (
    Gemm,
    Norm,
    PrefillAttention,
    PrefillLayer,
    Scratch,
    apply_rope,
)

BF16 = torch.bfloat16
HIDDEN, HEADS, KV_HEADS, SIZE, WIDTH = 96, 4, 2, 32, 160
SCALING = 0.3
NAMES = ("q", "k", "v", "o", "up", "down")

each_dtype = pytest.mark.parametrize("dtype", [BF16, torch.float32])
pytestmark = pytest.mark.usefixtures("isa")


def draw(*shape, dtype):
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)


def draw_weights(biased, by_input, dtype):
    torch.manual_seed(0)
    inner = HEADS * SIZE
    shapes = {
        "q": (inner, HIDDEN), "k": (KV_HEADS * SIZE, HIDDEN), "v": (KV_HEADS * SIZE, HIDDEN),
        "o": (HIDDEN, inner), "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }  # fmt: skip
    weights = {name: draw(*shape, dtype=dtype) for name, shape in shapes.items()}
    if biased:
        weights |= {f"{k}_bias": draw(shape[0], dtype=dtype) for k, shape in shapes.items()}
    if by_input:
        weights["down"] = weights["down"].t().contiguous().t()
    first, second = (1 + draw(HIDDEN, dtype=dtype) for _ in range(2))
    return weights, (Norm(first, 1e-5), Norm(second, 1e-6))


def make_mask(kind, batch, length, dtype):
    if kind == "bool":
        return torch.rand(batch, 1, length, length).gt(0.4) | torch.eye(length).bool()
    if kind == "added":
        return torch.randn(batch, 1, 1, length).to(dtype)
    return torch.randn(1, 1, length, length).to(dtype) if kind == "one for all" else None


def run_in_turn(x, weights, norms, cos_sin, mask, causal, kept):
    gemm = Gemm()

    def bias(name):
        return weights.get(f"{name}_bias")

    qkv = gemm.joint(x, [weights[n] for n in "qkv"], [bias(n) for n in "qkv"], norms[0]).view(
        *x.shape[:2], -1, SIZE
    )
    query, key, value = apply_rope(qkv, *cos_sin, KV_HEADS)
    mixed = PrefillAttention().attend(query, key, value, mask, SCALING, causal).flatten(2)
    middle = gemm.linear(mixed, weights["o"], bias("o"), x)
    active = gemm.gated(
        middle, weights["gate"], weights["up"], bias("gate"), bias("up"), "silu", kept, norms[1]
    )
    out = gemm.linear(active, weights["down"], bias("down"), middle)
    return key, value, middle, active, out


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@each_dtype
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [2, 16, 33, 130])
@pytest.mark.parametrize("mask", ["none", "bool", "added", "one for all"])
@pytest.mark.parametrize(("biased", "by_input"), [(False, False), (True, True)])
def test_as_in_turn(length, mask, biased, by_input, dtype):
    weights, norms = draw_weights(biased, by_input, dtype)
    batch, rope_batch = 2, 2 if biased else 1
    x, causal = draw(batch, length, HIDDEN, dtype=dtype), mask == "none"
    cos_sin = tuple(draw(rope_batch, length, SIZE, dtype=dtype) for _ in range(2))
    mask = make_mask(mask, batch, length, dtype)
    slots = torch.full((batch * length,), -1, dtype=torch.int32)
    slots[1], slots[-1] = 1, 0
    gates = torch.zeros(2, 2, WIDTH, dtype=dtype)
    expected = run_in_turn(x, weights, norms, cos_sin, mask, causal, (slots, gates[0]))
    layer = PrefillLayer(weights, norms, SIZE, "silu", SCALING, Scratch())
    middle = torch.empty_like(x)
    done = layer.run(x, cos_sin, mask, causal, middle, (slots, gates[1]))
    assert done.middle is middle
    for ours, theirs in zip((*done[1:], gates[1]), (*expected, gates[0]), strict=True):
        assert torch.equal(ours, theirs)
    assert done.key.is_contiguous() and done.value.is_contiguous()


def test_gates_need_not_be_kept_and_angles_may_lie_anyhow():
    weights, norms = draw_weights(False, False, BF16)
    x, cos = draw(1, 40, HIDDEN, dtype=BF16), draw(1, 40, SIZE, dtype=BF16)
    cos_sin = cos, draw(1, SIZE, 40, dtype=BF16).transpose(1, 2)
    expected = run_in_turn(x, weights, norms, cos_sin, None, True, None)
    layer = PrefillLayer(weights, norms, SIZE, "silu", SCALING, Scratch())
    assert torch.equal(layer.run(x, cos_sin, None, True).out, expected[-1])


@each_dtype
@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("mask", ["none", "added"])
def test_layers_of_towers(length, mask, dtype):
    weights, norms = draw_weights(True, False, dtype)
    shapes = {"k": (HEADS * SIZE, HIDDEN), "v": (HEADS * SIZE, HIDDEN)}
    weights |= {name: draw(*shape, dtype=dtype) for name, shape in shapes.items()}
    weights |= {f"{name}_bias": draw(shape[0], dtype=dtype) for name, shape in shapes.items()}
    del weights["gate"], weights["gate_bias"]
    first, second = (norm._replace(bias=draw(HIDDEN, dtype=dtype)) for norm in norms)
    x, mask = draw(2, length, HIDDEN, dtype=dtype), make_mask(mask, 2, length, dtype)
    gemm, bias = Gemm(), {name: weights[f"{name}_bias"] for name in NAMES}
    qkv = gemm.joint(x, [weights[n] for n in "qkv"], [bias[n] for n in "qkv"], first)
    parts = qkv.view(2, length, -1, SIZE).transpose(1, 2).chunk(3, dim=1)
    mixed = PrefillAttention().attend(*parts, mask, SCALING, False).flatten(2)
    middle = gemm.linear(mixed, weights["o"], bias["o"], x)
    active = gemm.linear(middle, weights["up"], bias["up"], activation="quick_gelu", norm=second)
    out = gemm.linear(active, weights["down"], bias["down"], middle)
    layer = PrefillLayer(weights, (first, second), SIZE, "quick_gelu", SCALING, Scratch())
    done = layer.run(x, None, mask, False)
    assert done.key is None and done.value is None
    expected = qkv, middle, active, out
    for ours, theirs in zip((done.qkv, *done[3:]), expected, strict=True):
        assert torch.equal(ours, theirs)
