"""The C kernels of prompts round as PyTorch's operators do, whatever the number of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from corematching.kernels.native import (
    TileProducts,
    find_library,
    has_tiles,
    mark_highest,
    normalise,
    pick_highest,
    refuse_tiles,
    rotate,
    sum_rows,
    weigh_marks,
)

BF16 = torch.bfloat16
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

compiled = pytest.mark.skipif(find_library() is None, reason="no C compiler")
tiled = pytest.mark.skipif(not has_tiles(), reason="this processor has no matrix tiles (AMX)")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, scale=1.0, dtype=BF16):
    return (scale * torch.randn(*shape)).to(dtype)


def differ(ours, theirs):
    """The error's norm over the norm, and the share of numbers that are not equal."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return float(error), float((ours != theirs).float().mean())


@tiled
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (96, 160), (576, 64)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products(rows, inputs, outputs, by_input):
    x, weight = draw(rows, inputs), draw(outputs, inputs, scale=inputs**-0.5)
    stored = weight.t().contiguous().t() if by_input else weight
    for bias in (None, draw(outputs)):
        ours = TileProducts().linear(x, stored, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        error, unequal = differ(ours, exact.to(BF16))
        assert error < 1e-3
        assert unequal < 0.01


@tiled
@pytest.mark.parametrize("by_input", [False, True])
def test_residuals_are_added_to_the_rounded_product(by_input):
    x, weight, residual = draw(37, 64), draw(96, 64, scale=0.2), draw(37, 96)
    stored = weight.t().contiguous().t() if by_input else weight
    products = TileProducts()
    alone = products.linear(x, stored, None)
    assert torch.equal(products.linear(x, stored, None, residual), alone + residual)


@tiled
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [2, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(name, rows, bias):
    x = draw(2, rows, 64)
    gate, up = draw(96, 64, scale=0.3), draw(96, 64, scale=0.3)
    gate_bias, up_bias = (draw(96), draw(96)) if bias else (None, None)
    ours = TileProducts().gated(x, gate, up, gate_bias, up_bias, name)
    theirs = FUNCTIONS[name](F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    error, unequal = differ(ours, theirs)
    assert ours.shape == (2, rows, 96)
    assert error < 2e-3
    assert unequal < (0.1 if "gelu" in name else 0.02)


@tiled
def test_large_gates_neither_overflow_nor_vanish():
    x, up = torch.ones(3, 32, dtype=BF16), torch.ones(32, 32, dtype=BF16)
    gate = torch.linspace(-400, 400, 32, dtype=torch.float32).to(BF16)[:, None].expand(32, 32)
    gate = (gate / 32).contiguous()
    ours = TileProducts().gated(x, gate, up, None, None, "silu")
    torch.testing.assert_close(ours, F.silu(F.linear(x, gate)) * F.linear(x, up))


@tiled
@pytest.mark.parametrize("rows", [2, 33])
def test_several_at_once_are_each_alone(rows):
    x, products = draw(1, rows, 96), TileProducts()
    weights = [draw(64, 96), draw(32, 96), draw(32, 96)]
    biases = [draw(64), None, draw(32)]
    ours = products.several(x, weights, biases)
    alone = [products.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(ours, torch.cat(alone, -1))


@tiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(threads):
    x, weight, products = draw(50, 64), draw(96, 64), TileProducts()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = products.linear(x, weight, None)
        some = products.linear(x[7:20], weight, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[7:20], some)


@tiled
def test_scratch_memory_grows_and_is_kept():
    products = TileProducts()
    first = products.linear(draw(2, 32), draw(32, 32), None)
    kept = first.clone()
    x, weight = draw(300, 320), draw(64, 320, scale=0.05)
    assert differ(products.linear(x, weight, None), F.linear(x, weight))[0] < 1e-3
    assert torch.equal(first, kept)


def test_other_matrices_are_refused():
    assert "float32" in refuse_tiles(torch.zeros(32, 32))
    assert "multiple of 32" in refuse_tiles(torch.zeros(32, 40, dtype=BF16))
    assert "contiguous" in refuse_tiles(torch.zeros(64, 128, dtype=BF16)[:, ::2])
    assert "meta" in refuse_tiles(torch.zeros(32, 32, dtype=BF16, device="meta"))
    assert (refuse_tiles(torch.zeros(32, 32, dtype=BF16)) is None) == has_tiles()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 40, 576)])
def test_norms(dtype, shape):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data = draw(shape[-1], dtype=dtype)
    x = draw(*shape, scale=3.0, dtype=dtype)
    with torch.no_grad():
        error, unequal = differ(normalise(x, norm.weight, 1e-5), norm(x))
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert unequal < 0.02 or dtype == torch.float32


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotations(dtype, rows):
    x = draw(2, 9, 5, 16, dtype=dtype)
    cos, sin = draw(rows, 9, 16, dtype=dtype), draw(rows, 9, 16, dtype=dtype)
    before = x.clone()
    rotate(x, cos, sin, 3)
    turned, _ = apply_rotary_pos_emb(*(before.transpose(1, 2),) * 2, cos, sin)
    torch.testing.assert_close(x[:, :, :3], turned.transpose(1, 2)[:, :, :3])
    assert torch.equal(x[:, :, 3:], before[:, :, 3:])


@compiled
@pytest.mark.parametrize("count", [1, 7, 63, 64])
def test_the_highest_scores(count):
    rows = torch.stack([torch.randn(64), torch.randint(-2, 3, (64,)).float(), torch.zeros(64)])
    rows[2, ::2] = -0.0
    order = rows.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    assert torch.equal(pick_highest(rows, count), order)
    rows[1, 3] = float("inf")
    rows[0, 5] = -float("inf")
    order = rows.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
    assert torch.equal(pick_highest(rows, count), order)


@compiled
def test_no_highest_scores_among_nan_or_other_types():
    assert pick_highest(torch.tensor([[1.0, float("nan"), 2.0]]), 1) is None
    assert pick_highest(torch.tensor([[1, 2, 3]]), 1) is None


@compiled
@pytest.mark.parametrize("batch", [1, 3])
def test_sums_over_marks(batch):
    marks, tokens = torch.rand(batch, 9, 37) < 0.4, torch.rand(batch, 9) < 0.6
    weights = torch.randn(batch, 37)
    counted = (marks & tokens[..., None]).sum(1).float()
    for what in ("values", "sizes"):
        assert torch.equal(sum_rows(marks, tokens, what), counted)
    torch.testing.assert_close(
        weigh_marks(marks, weights), torch.einsum("btf,bf->bt", marks.float(), weights)
    )
    assert sum_rows(marks.long(), tokens, "values") is None
    assert weigh_marks(marks[..., ::2], weights[:, ::2]) is None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_largest_of_each_token(dtype, absolute):
    values = draw(2, 5, 40, dtype=dtype)
    values[0, 0] = 0
    values[0, 1] = -1
    values[1, 0, ::2] = values[1, 0, 1]
    counts = torch.randint(1, 41, (2, 5, 1))
    ranked = values.abs() if absolute else values
    cuts = ranked.sort(-1, descending=True).values.gather(-1, counts - 1)
    expected = (ranked >= cuts) & (ranked > 0)
    assert torch.equal(mark_highest(values, counts, absolute), expected)
    assert mark_highest(values.double(), counts, absolute) is None
