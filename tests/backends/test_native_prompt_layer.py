"""A whole layer in one call gives, to the bit, what its products and its attention give in turn."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import (
    Norm,
    Products,
    PromptLayer,
    Scratch,
    TiledAttention,
    has_tiles,
    rotate_apart,
)

BF16 = torch.bfloat16
HIDDEN, HEADS, GROUPS, SIZE, WIDTH = 96, 4, 2, 32, 160
SCALING = 0.3
NAMES = ("q", "k", "v", "o", "up", "down")

pytestmark = pytest.mark.skipif(not has_tiles(), reason="this processor has no matrix tiles (AMX)")


def draw(*shape):
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(BF16)


def draw_weights(biased, by_input):
    torch.manual_seed(0)
    inner = HEADS * SIZE
    shapes = {
        "q": (inner, HIDDEN), "k": (GROUPS * SIZE, HIDDEN), "v": (GROUPS * SIZE, HIDDEN),
        "o": (HIDDEN, inner), "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }  # fmt: skip
    weights = {name: draw(*shape) for name, shape in shapes.items()}
    if biased:
        weights |= {f"{name}_bias": draw(shape[0]) for name, shape in shapes.items()}
    if by_input:
        weights["down"] = weights["down"].t().contiguous().t()
    return weights, (Norm(1 + draw(HIDDEN), 1e-5), Norm(1 + draw(HIDDEN), 1e-6))


def make_mask(kind, batch, length):
    if kind == "bool":
        return torch.rand(batch, 1, length, length).gt(0.4) | torch.eye(length).bool()
    if kind == "summands":
        return torch.randn(batch, 1, 1, length).to(BF16)
    return torch.randn(1, 1, length, length).to(BF16) if kind == "one for all" else None


def run_in_turn(x, weights, norms, cos_sin, mask, causal, kept):
    products = Products("tiles")

    def bias(name):
        return weights.get(f"{name}_bias")

    qkv = products.several(x, [weights[n] for n in "qkv"], [bias(n) for n in "qkv"], norms[0]).view(
        *x.shape[:2], -1, SIZE
    )
    query, key, value = rotate_apart(qkv, *cos_sin, GROUPS)
    mixed = TiledAttention().attend(query, key, value, mask, SCALING, causal).flatten(2)
    middle = products.linear(mixed, weights["o"], bias("o"), x)
    active = products.gated(
        middle, weights["gate"], weights["up"], bias("gate"), bias("up"), "silu", kept, norms[1]
    )
    out = products.linear(active, weights["down"], bias("down"), middle)
    return key, value, middle, active, out


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [2, 16, 33, 130])
@pytest.mark.parametrize("mask", ["none", "bool", "summands", "one for all"])
@pytest.mark.parametrize(("biased", "by_input"), [(False, False), (True, True)])
def test_as_in_turn(length, mask, biased, by_input):
    weights, norms = draw_weights(biased, by_input)
    batch = 2
    x, causal = draw(batch, length, HIDDEN), mask == "none"
    cos_sin = draw(batch if biased else 1, length, SIZE), draw(batch if biased else 1, length, SIZE)
    mask = make_mask(mask, batch, length)
    places = torch.full((batch * length,), -1, dtype=torch.int32)
    places[1], places[-1] = 1, 0
    gates = torch.zeros(2, 2, WIDTH, dtype=BF16)
    expected = run_in_turn(x, weights, norms, cos_sin, mask, causal, (places, gates[0]))
    layer = PromptLayer(weights, norms, SIZE, "silu", SCALING, Scratch())
    middle = torch.empty_like(x)
    done = layer.run(x, cos_sin, mask, causal, middle, (places, gates[1]))
    assert done.middle is middle
    for ours, theirs in zip((*done[1:], gates[1]), (*expected, gates[0]), strict=True):
        assert torch.equal(ours, theirs)
    assert done.key.is_contiguous() and done.value.is_contiguous()


def test_gates_need_not_be_kept_and_angles_may_lie_anyhow():
    weights, norms = draw_weights(False, False)
    x, cos_sin = draw(1, 40, HIDDEN), (draw(1, 40, SIZE), draw(1, SIZE, 40).transpose(1, 2))
    expected = run_in_turn(x, weights, norms, cos_sin, None, True, None)
    layer = PromptLayer(weights, norms, SIZE, "silu", SCALING, Scratch())
    assert torch.equal(layer.run(x, cos_sin, None, True).out, expected[-1])


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("mask", ["none", "summands"])
def test_layers_of_towers(length, mask):
    weights, norms = draw_weights(True, False)
    shapes = {"k": (HEADS * SIZE, HIDDEN), "v": (HEADS * SIZE, HIDDEN)}
    weights |= {name: draw(*shape) for name, shape in shapes.items()}
    weights |= {f"{name}_bias": draw(shape[0]) for name, shape in shapes.items()}
    del weights["gate"], weights["gate_bias"]
    first, second = (norm._replace(shift=draw(HIDDEN)) for norm in norms)
    x, mask = draw(2, length, HIDDEN), make_mask(mask, 2, length)
    products, bias = Products("tiles"), {name: weights[f"{name}_bias"] for name in NAMES}
    qkv = products.several(x, [weights[n] for n in "qkv"], [bias[n] for n in "qkv"], first)
    parts = qkv.view(2, length, -1, SIZE).transpose(1, 2).chunk(3, dim=1)
    mixed = TiledAttention().attend(*parts, mask, SCALING, False).flatten(2)
    middle = products.linear(mixed, weights["o"], bias["o"], x)
    active = products.linear(
        middle, weights["up"], bias["up"], activation="quick_gelu", norm=second
    )
    out = products.linear(active, weights["down"], bias["down"], middle)
    layer = PromptLayer(weights, (first, second), SIZE, "quick_gelu", SCALING, Scratch())
    done = layer.run(x, None, mask, False)
    assert done.key is None and done.value is None
    expected = qkv, middle, active, out
    for ours, theirs in zip((done.qkv, *done[3:]), expected, strict=True):
        assert torch.equal(ours, theirs)
