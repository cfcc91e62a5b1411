"""The C kernels of prompts round as PyTorch's operators do, whatever the number of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from corematching.backends.cpu.native import (
    TILES,
    VECTORS,
    Norm,
    Products,
    find_library,
    find_size,
    has_tiles,
    mark_highest,
    normalise,
    pick_highest,
    refuse_product,
    rotate_apart,
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
on_units = pytest.mark.parametrize(
    ("unit", "dtype"),
    [
        pytest.param(VECTORS, BF16, marks=compiled, id="vectors-bf16"),
        pytest.param(VECTORS, torch.float32, marks=compiled, id="vectors-fp32"),
        pytest.param(TILES, BF16, marks=tiled, id="tiles"),
    ],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, scale=1.0, dtype=BF16):
    return (scale * torch.randn(*shape)).to(dtype)


def differ(ours, theirs):
    """The error's norm over the norm, and the share of numbers that are not equal."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return float(error), float((ours != theirs).float().mean())


def largest_error(ours, exact, dtype):
    """The largest error against float64, over the largest that one rounding explains."""
    bound = exact.abs() * (2**-8 if dtype == BF16 else 2**-24) + 2e-6 * exact.abs().max()
    return float(((ours.double() - exact).abs() / bound).max())


@on_units
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (96, 160), (576, 64)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products(unit, dtype, rows, inputs, outputs, by_input):
    check_product(unit, dtype, rows, inputs, outputs, by_input)


@on_units
@pytest.mark.parametrize("size", [(3, 800, 1376), (50, 800, 1376), (300, 800, 96)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products_that_caches_do_not_hold(unit, dtype, size, by_input):
    check_product(unit, dtype, *size, by_input)


@tiled
def test_many_rows_of_many_inputs():
    check_product(TILES, BF16, 200, 4640, 96, by_input=False)


@tiled
def test_rows_do_not_depend_on_the_others():
    x, weight, gate = draw(2, 300, 2048), draw(64, 2048, scale=0.02), draw(64, 2048, scale=0.02)
    norm, residual = Norm(draw(2048), 1e-5), draw(2, 300, 64)
    places = torch.full((600,), -1, dtype=torch.int32)
    places[[5, 310, 599]] = torch.arange(3, dtype=torch.int32)
    kept = torch.zeros(3, 64, dtype=BF16)
    products = Products(TILES)
    plain = products.linear(x, weight, None, residual, "gelu")
    several = products.several(x, [weight, gate], [None, None], norm)
    gated = products.gated(x, gate, weight, None, None, "silu", (places, kept), norm)
    for row, place in ((5, 0), (310, 1), (599, 2)):
        one, own = x.view(600, -1)[row : row + 2], torch.zeros(1, 64, dtype=BF16)
        more = residual.view(600, -1)[row : row + 2]
        alone = torch.tensor([0] + [-1] * (len(one) - 1), dtype=torch.int32)
        first = products.gated(one, gate, weight, None, None, "silu", (alone, own), norm)[0]
        assert torch.equal(first, gated.view(600, -1)[row]) and torch.equal(own[0], kept[place])
        first = products.several(one, [weight, gate], [None, None], norm)[0]
        assert torch.equal(first, several.view(600, -1)[row])
        first = products.linear(one, weight, None, more, "gelu")[0]
        assert torch.equal(first, plain.view(600, -1)[row])


@compiled
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 400])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 17), (33, 15), (391, 100), (800, 9)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products_of_odd_sizes(dtype, rows, inputs, outputs, by_input):
    check_product(VECTORS, dtype, rows, inputs, outputs, by_input)


def check_product(unit, dtype, rows, inputs, outputs, by_input):
    x = draw(rows, inputs, dtype=dtype)
    weight = draw(outputs, inputs, scale=inputs**-0.5, dtype=dtype)
    stored = weight.t().contiguous().t() if by_input else weight
    assert refuse_product(stored, unit) is None
    for bias in (None, draw(outputs, dtype=dtype)):
        ours = Products(unit).linear(x, stored, bias)
        assert ours.shape == (rows, outputs) and ours.dtype == dtype
        wide = None if bias is None else bias.double()
        assert largest_error(ours, F.linear(x.double(), weight.double(), wide), dtype) <= 1


@on_units
@pytest.mark.parametrize("by_input", [False, True])
def test_residuals_are_added_to_the_rounded_product(unit, dtype, by_input):
    x, weight = draw(37, 64, dtype=dtype), draw(96, 64, scale=0.2, dtype=dtype)
    residual = draw(37, 96, dtype=dtype)
    stored = weight.t().contiguous().t() if by_input else weight
    products = Products(unit)
    alone = products.linear(x, stored, None)
    assert torch.equal(products.linear(x, stored, None, residual), alone + residual)


@on_units
@pytest.mark.parametrize("name", [*FUNCTIONS, "quick_gelu"])
def test_an_activation_is_applied_to_the_rounded_product(unit, dtype, name):
    x, weight = draw(37, 64, dtype=dtype), draw(96, 64, scale=0.5, dtype=dtype)
    bias, residual = draw(96, dtype=dtype), draw(37, 96, dtype=dtype)
    products = Products(unit)
    plain = products.linear(x, weight, bias)
    function = FUNCTIONS.get(name, lambda x: x * torch.sigmoid(1.702 * x))
    active = products.linear(x, weight, bias, activation=name)
    error, _ = differ(active, function(plain))
    assert error < (1e-3 if dtype == BF16 else 1e-6)
    added = products.linear(x, weight, bias, residual, name)
    assert torch.equal(added, active + residual)


@on_units
@pytest.mark.parametrize("name", [*FUNCTIONS, "quick_gelu"])
def test_activations_of_the_largest_numbers(unit, dtype, name):
    large = torch.tensor([1e4, -1e4, 1e30, -1e30, 1e20, torch.nan, 0.0, 20.0] * 4, dtype=dtype)
    zeros = torch.zeros(3, 32, dtype=dtype), torch.zeros(32, 32, dtype=dtype)
    ours = Products(unit).linear(*zeros, large, activation=name)[0]
    function = FUNCTIONS.get(name, lambda x: x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(ours, function(large), rtol=1e-2, atol=1e-6, equal_nan=True)


@on_units
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [2, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(unit, dtype, name, rows, bias):
    check_gated(unit, dtype, name, (2, rows, 64), 96, bias)


@compiled
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 1, 576), (5, 391), (400, 33)])
@pytest.mark.parametrize("width", [3, 75])
def test_gated_of_odd_sizes(dtype, shape, width):
    check_gated(VECTORS, dtype, "silu", shape, width, bias=True)


def check_gated(unit, dtype, name, shape, width, bias):
    x = draw(*shape, dtype=dtype)
    scale = 2.4 * shape[-1] ** -0.5
    gate, up = (draw(width, shape[-1], scale=scale, dtype=dtype) for _ in range(2))
    biases = (draw(width, dtype=dtype), draw(width, dtype=dtype)) if bias else (None, None)
    ours = Products(unit).gated(x, gate, up, *biases, name)
    assert ours.shape == (*shape[:-1], width)
    sums = (F.linear(x.float(), w.float()) for w in (gate, up))
    sums = [s if b is None else s + b.float() for s, b in zip(sums, biases, strict=True)]
    theirs = FUNCTIONS[name](sums[0].to(dtype)) * sums[1].to(dtype)
    error, unequal = differ(ours, theirs)
    if dtype == torch.float32:
        assert error < 5e-6
    else:
        assert error < 2e-3
        assert unequal < (0.1 if "gelu" in name else 0.02)


@on_units
@pytest.mark.parametrize("rows", [3, 16, 40, 70])
def test_gates_are_kept_where_they_are_wanted(unit, dtype, rows):
    x, gate, up = draw(rows, 64, dtype=dtype), draw(96, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    wanted = torch.randperm(rows)[: rows // 3 + 1]
    places = torch.full((rows,), -1, dtype=torch.int32)
    places[wanted] = torch.arange(len(wanted), dtype=torch.int32)
    kept = torch.full((len(wanted) + 1, 96), 7.0, dtype=dtype)
    products = Products(unit)
    ours = products.gated(x, gate, up, None, None, "silu", (places, kept))
    assert torch.equal(ours, products.gated(x, gate, up, None, None, "silu"))
    theirs = F.silu(products.linear(x[wanted], gate, None))
    torch.testing.assert_close(kept[:-1], theirs, rtol=1e-2, atol=1e-5)
    assert (kept[-1] == 7).all()


@on_units
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 33, 70])
def test_norms_in_front_of_products(unit, dtype, rows, shifted):
    x, weight, first = (
        draw(2, rows, 96, dtype=dtype),
        draw(96, dtype=dtype),
        draw(64, 96, dtype=dtype),
    )
    second, products = draw(64, 96, dtype=dtype), Products(unit)
    norm = Norm(weight, 1e-5, draw(96, dtype=dtype) if shifted else None)
    normed = normalise(x, norm)
    biases, before = [None, draw(64, dtype=dtype)], x.clone()
    ours = products.several(x, [first, second], biases, norm)
    assert torch.equal(ours, products.several(normed, [first, second], biases))
    gated = products.gated(x, first, second, None, None, "silu", None, norm)
    assert torch.equal(gated, products.gated(normed, first, second, None, None, "silu"))
    plain = products.linear(x, first, None, norm=norm)
    assert torch.equal(plain, products.linear(normed, first, None))
    assert torch.equal(x, before)


@on_units
def test_large_gates_neither_overflow_nor_vanish(unit, dtype):
    x, up = torch.ones(3, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype)
    gate = torch.linspace(-400, 400, 32, dtype=torch.float32).to(dtype)[:, None].expand(32, 32)
    gate = (gate / 32).contiguous()
    ours = Products(unit).gated(x, gate, up, None, None, "silu")
    torch.testing.assert_close(ours, F.silu(F.linear(x, gate)) * F.linear(x, up))


@on_units
@pytest.mark.parametrize("rows", [2, 33])
def test_several_at_once_are_each_alone(unit, dtype, rows):
    x, products = draw(1, rows, 96, dtype=dtype), Products(unit)
    weights = [draw(n, 96, dtype=dtype) for n in (64, 32, 32)]
    biases = [draw(64, dtype=dtype), None, draw(32, dtype=dtype)]
    ours = products.several(x, weights, biases)
    alone = [products.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(ours, torch.cat(alone, -1))


@on_units
@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_a_row_does_not_depend_on_the_others(unit, dtype, threads):
    x, weight = draw(50, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    products, before = Products(unit), torch.get_num_threads()
    alone = products.linear(x[7:20], weight, None)
    try:
        torch.set_num_threads(threads)
        whole = products.linear(x, weight, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[7:20], alone)


@on_units
def test_what_is_not_finite_stays_in_its_row(unit, dtype):
    x, weight = draw(9, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    clean = Products(unit).linear(x, weight, None)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    ours = Products(unit).linear(x, weight, None)
    assert ours[3].isnan().all() and not ours[7].isfinite().any()
    keep = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(ours[keep], clean[keep])


@on_units
def test_scratch_memory_grows_and_is_kept(unit, dtype):
    products = Products(unit)
    first = products.linear(draw(2, 32, dtype=dtype), draw(32, 32, dtype=dtype), None)
    kept = first.clone()
    x, weight = draw(300, 320, dtype=dtype), draw(64, 320, scale=0.05, dtype=dtype)
    exact = F.linear(x.double(), weight.double())
    assert largest_error(products.linear(x, weight, None), exact, dtype) <= 1
    assert torch.equal(first, kept)


def test_other_matrices_are_refused():
    assert "float32" in refuse_product(torch.zeros(32, 32), TILES)
    assert "multiple of 32" in refuse_product(torch.zeros(32, 40, dtype=BF16), TILES)
    assert (refuse_product(torch.zeros(32, 32, dtype=BF16), TILES) is None) == has_tiles()
    for unit in (VECTORS, TILES):
        assert "float64" in refuse_product(torch.zeros(32, 32, dtype=torch.float64), unit)
        assert "contiguous" in refuse_product(torch.zeros(64, 128, dtype=BF16)[:, ::2], unit)
        assert "meta" in refuse_product(torch.zeros(32, 32, dtype=BF16, device="meta"), unit)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 40, 576)])
def test_norms(dtype, shape):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data = draw(shape[-1], dtype=dtype)
    x = draw(*shape, scale=3.0, dtype=dtype)
    with torch.no_grad():
        error, unequal = differ(normalise(x, Norm(norm.weight, 1e-5)), norm(x))
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert unequal < 0.02 or dtype == torch.float32


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(1, 7, 33), (2, 40, 576)])
def test_layer_norms(dtype, shape):
    x, width = 4 + draw(*shape, scale=3.0, dtype=dtype), shape[-1]
    weight, bias = draw(width, dtype=dtype), draw(width, dtype=dtype)
    theirs = F.layer_norm(x, [width], weight, bias, 1e-5)
    error, unequal = differ(normalise(x, Norm(weight, 1e-5, bias)), theirs)
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert unequal < 0.02 or dtype == torch.float32


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotations(dtype, rows):
    x = draw(2, 9, 7, 16, dtype=dtype)
    cos, sin = draw(rows, 9, 16, dtype=dtype), draw(rows, 9, 16, dtype=dtype)
    queries, keys, values = x.clone().transpose(1, 2).split([3, 2, 2], dim=1)
    query, key, value = rotate_apart(x, cos, sin, 2)
    turned = apply_rotary_pos_emb(queries, keys, cos, sin)
    torch.testing.assert_close((query, key), turned)
    assert torch.equal(value, values) and key.is_contiguous() and value.is_contiguous()


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


@compiled
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("chosen", [False, True])
def test_sizes_by_rank(dtype, chosen):
    values = draw(3, 5, 70, dtype=dtype)
    values[0, 0, :9] = values[0, 1, 3]  # ties
    tokens = torch.rand(3, 5) > 0.3
    tokens[1], tokens[2, 0] = False, True
    neurons = torch.stack([torch.randperm(70)[:31] for _ in range(3)])
    among = neurons if chosen else None
    ranks = torch.where(tokens.any(1), tokens.sum(1) * 11, 0)
    values[~tokens] = torch.nan  # not looked at
    found = find_size(values, tokens, among, ranks)
    for sample in range(3):
        rows = values[sample, tokens[sample]]
        sizes = (rows[:, neurons[sample]] if chosen else rows).float().abs().flatten()
        rank = int(ranks[sample])
        assert found[sample] == (sizes.sort().values[rank - 1] if rank else 0)


@compiled
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_no_size_among_what_is_not_finite(odd):
    values, tokens = draw(1, 2, 9), torch.ones(1, 2, dtype=torch.bool)
    values[0, 1, 4] = odd
    assert find_size(values, tokens, None, torch.tensor([3])) is None
    assert find_size(values.half(), tokens, None, torch.tensor([3])) is None
