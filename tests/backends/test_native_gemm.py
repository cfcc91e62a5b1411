"""Products of prompts round as PyTorch's operators do, whatever the number of rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from corematching.backends.cpu.native import (
    Gemm,
    Norm,
    normalize,
    why_unsupported_gemm,
)

BF16 = torch.bfloat16
FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

each_dtype = pytest.mark.parametrize("dtype", [BF16, torch.float32])
pytestmark = pytest.mark.usefixtures("isa")


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


@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (96, 160), (576, 64)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products(dtype, rows, inputs, outputs, by_input):
    check_product(dtype, rows, inputs, outputs, by_input)


@each_dtype
@pytest.mark.parametrize("size", [(3, 800, 1376), (50, 800, 1376), (300, 800, 96)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products_that_caches_do_not_hold(dtype, size, by_input):
    check_product(dtype, *size, by_input)


def test_many_rows_of_many_inputs():
    check_product(BF16, 200, 4640, 96, by_input=False)


def test_rows_do_not_depend_on_the_others():
    x, weight, gate = draw(2, 300, 2048), draw(64, 2048, scale=0.02), draw(64, 2048, scale=0.02)
    norm, residual = Norm(draw(2048), 1e-5), draw(2, 300, 64)
    slots = torch.full((600,), -1, dtype=torch.int32)
    slots[[5, 310, 599]] = torch.arange(3, dtype=torch.int32)
    kept = torch.zeros(3, 64, dtype=BF16)
    gemm = Gemm()
    plain = gemm.linear(x, weight, None, residual, "gelu")
    joint = gemm.joint(x, [weight, gate], [None, None], norm)
    gated = gemm.gated(x, gate, weight, None, None, "silu", (slots, kept), norm)
    for row, slot in ((5, 0), (310, 1), (599, 2)):
        one, own = x.view(600, -1)[row : row + 2], torch.zeros(1, 64, dtype=BF16)
        more = residual.view(600, -1)[row : row + 2]
        alone = torch.tensor([0] + [-1] * (len(one) - 1), dtype=torch.int32)
        first = gemm.gated(one, gate, weight, None, None, "silu", (alone, own), norm)[0]
        assert torch.equal(first, gated.view(600, -1)[row]) and torch.equal(own[0], kept[slot])
        first = gemm.joint(one, [weight, gate], [None, None], norm)[0]
        assert torch.equal(first, joint.view(600, -1)[row])
        first = gemm.linear(one, weight, None, more, "gelu")[0]
        assert torch.equal(first, plain.view(600, -1)[row])


@each_dtype
@pytest.mark.parametrize("rows", [1, 7, 400])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 17), (33, 15), (391, 100), (800, 9)])
@pytest.mark.parametrize("by_input", [False, True])
def test_products_of_odd_sizes(dtype, rows, inputs, outputs, by_input):
    check_product(dtype, rows, inputs, outputs, by_input)


def check_product(dtype, rows, inputs, outputs, by_input):
    x = draw(rows, inputs, dtype=dtype)
    weight = draw(outputs, inputs, scale=inputs**-0.5, dtype=dtype)
    stored = weight.t().contiguous().t() if by_input else weight
    assert why_unsupported_gemm(stored) is None
    for bias in (None, draw(outputs, dtype=dtype)):
        ours = Gemm().linear(x, stored, bias)
        assert ours.shape == (rows, outputs) and ours.dtype == dtype
        wide = None if bias is None else bias.double()
        assert largest_error(ours, F.linear(x.double(), weight.double(), wide), dtype) <= 1


@each_dtype
@pytest.mark.parametrize("by_input", [False, True])
def test_residuals_are_added_to_the_rounded_product(dtype, by_input):
    x, weight = draw(37, 64, dtype=dtype), draw(96, 64, scale=0.2, dtype=dtype)
    residual = draw(37, 96, dtype=dtype)
    stored = weight.t().contiguous().t() if by_input else weight
    gemm = Gemm()
    alone = gemm.linear(x, stored, None)
    assert torch.equal(gemm.linear(x, stored, None, residual), alone + residual)


@each_dtype
@pytest.mark.parametrize("name", [*FUNCTIONS, "quick_gelu"])
def test_an_activation_is_applied_to_the_rounded_product(dtype, name):
    x, weight = draw(37, 64, dtype=dtype), draw(96, 64, scale=0.5, dtype=dtype)
    bias, residual = draw(96, dtype=dtype), draw(37, 96, dtype=dtype)
    gemm = Gemm()
    plain = gemm.linear(x, weight, bias)
    function = FUNCTIONS.get(name, lambda x: x * torch.sigmoid(1.702 * x))
    active = gemm.linear(x, weight, bias, activation=name)
    error, _ = differ(active, function(plain))
    assert error < (1e-3 if dtype == BF16 else 1e-6)
    added = gemm.linear(x, weight, bias, residual, name)
    assert torch.equal(added, active + residual)


@each_dtype
@pytest.mark.parametrize("name", [*FUNCTIONS, "quick_gelu"])
def test_activations_of_the_largest_numbers(dtype, name):
    large = torch.tensor([1e4, -1e4, 1e30, -1e30, 1e20, torch.nan, 0.0, 20.0] * 4, dtype=dtype)
    zeros = torch.zeros(3, 32, dtype=dtype), torch.zeros(32, 32, dtype=dtype)
    ours = Gemm().linear(*zeros, large, activation=name)[0]
    function = FUNCTIONS.get(name, lambda x: x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(ours, function(large), rtol=1e-2, atol=1e-6, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [2, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_gated(dtype, name, rows, bias):
    check_gated(dtype, name, (2, rows, 64), 96, bias)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 1, 576), (5, 391), (400, 33)])
@pytest.mark.parametrize("width", [3, 75])
def test_gated_of_odd_sizes(dtype, shape, width):
    check_gated(dtype, "silu", shape, width, bias=True)


def check_gated(dtype, name, shape, width, bias):
    x = draw(*shape, dtype=dtype)
    scale = 2.4 * shape[-1] ** -0.5
    gate, up = (draw(width, shape[-1], scale=scale, dtype=dtype) for _ in range(2))
    biases = (draw(width, dtype=dtype), draw(width, dtype=dtype)) if bias else (None, None)
    ours = Gemm().gated(x, gate, up, *biases, name)
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


@each_dtype
@pytest.mark.parametrize("rows", [3, 16, 40, 70])
def test_gates_are_kept_where_they_are_wanted(dtype, rows):
    x, gate, up = draw(rows, 64, dtype=dtype), draw(96, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    wanted = torch.randperm(rows)[: rows // 3 + 1]
    slots = torch.full((rows,), -1, dtype=torch.int32)
    slots[wanted] = torch.arange(len(wanted), dtype=torch.int32)
    kept = torch.full((len(wanted) + 1, 96), 7.0, dtype=dtype)
    gemm = Gemm()
    ours = gemm.gated(x, gate, up, None, None, "silu", (slots, kept))
    assert torch.equal(ours, gemm.gated(x, gate, up, None, None, "silu"))
    theirs = F.silu(gemm.linear(x[wanted], gate, None))
    torch.testing.assert_close(kept[:-1], theirs, rtol=1e-2, atol=1e-5)
    assert (kept[-1] == 7).all()


@each_dtype
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 33, 70])
def test_norms_in_front_of_products(dtype, rows, shifted):
    x, weight, first = (
        draw(2, rows, 96, dtype=dtype),
        draw(96, dtype=dtype),
        draw(64, 96, dtype=dtype),
    )
    second, gemm = draw(64, 96, dtype=dtype), Gemm()
    norm = Norm(weight, 1e-5, draw(96, dtype=dtype) if shifted else None)
    normed = normalize(x, norm)
    biases, before = [None, draw(64, dtype=dtype)], x.clone()
    ours = gemm.joint(x, [first, second], biases, norm)
    assert torch.equal(ours, gemm.joint(normed, [first, second], biases))
    gated = gemm.gated(x, first, second, None, None, "silu", None, norm)
    assert torch.equal(gated, gemm.gated(normed, first, second, None, None, "silu"))
    plain = gemm.linear(x, first, None, norm=norm)
    assert torch.equal(plain, gemm.linear(normed, first, None))
    assert torch.equal(x, before)


@each_dtype
def test_large_gates_neither_overflow_nor_vanish(dtype):
    x, up = torch.ones(3, 32, dtype=dtype), torch.ones(32, 32, dtype=dtype)
    gate = torch.linspace(-400, 400, 32, dtype=torch.float32).to(dtype)[:, None].expand(32, 32)
    gate = (gate / 32).contiguous()
    ours = Gemm().gated(x, gate, up, None, None, "silu")
    torch.testing.assert_close(ours, F.silu(F.linear(x, gate)) * F.linear(x, up))


@each_dtype
@pytest.mark.parametrize("rows", [2, 33])
def test_joint_products_are_each_alone(dtype, rows):
    x, gemm = draw(1, rows, 96, dtype=dtype), Gemm()
    weights = [draw(n, 96, dtype=dtype) for n in (64, 32, 32)]
    biases = [draw(64, dtype=dtype), None, draw(32, dtype=dtype)]
    ours = gemm.joint(x, weights, biases)
    alone = [gemm.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(ours, torch.cat(alone, -1))


@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_a_row_does_not_depend_on_the_others(dtype, threads):
    x, weight = draw(50, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    gemm, before = Gemm(), torch.get_num_threads()
    alone = gemm.linear(x[7:20], weight, None)
    try:
        torch.set_num_threads(threads)
        whole = gemm.linear(x, weight, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[7:20], alone)


@each_dtype
def test_what_is_not_finite_stays_in_its_row(dtype):
    x, weight = draw(9, 64, dtype=dtype), draw(96, 64, dtype=dtype)
    clean = Gemm().linear(x, weight, None)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    ours = Gemm().linear(x, weight, None)
    assert ours[3].isnan().all() and not ours[7].isfinite().any()
    keep = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(ours[keep], clean[keep])


@each_dtype
def test_scratch_memory_grows_and_is_kept(dtype):
    gemm = Gemm()
    first = gemm.linear(draw(2, 32, dtype=dtype), draw(32, 32, dtype=dtype), None)
    kept = first.clone()
    x, weight = draw(300, 320, dtype=dtype), draw(64, 320, scale=0.05, dtype=dtype)
    exact = F.linear(x.double(), weight.double())
    assert largest_error(gemm.linear(x, weight, None), exact, dtype) <= 1
    assert torch.equal(first, kept)


def test_other_matrices_are_refused():
    for dtype in (torch.float32, BF16):
        assert why_unsupported_gemm(torch.zeros(33, 40, dtype=dtype)) is None
    assert "shape" in why_unsupported_gemm(torch.zeros(32, 0))
    assert "float64" in why_unsupported_gemm(torch.zeros(32, 32, dtype=torch.float64))
    assert "contiguous" in why_unsupported_gemm(torch.zeros(64, 128, dtype=BF16)[:, ::2])
    assert "meta" in why_unsupported_gemm(torch.zeros(32, 32, dtype=BF16, device="meta"))
