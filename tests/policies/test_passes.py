"""Passes over the activations, block by block and token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from corematching.policies import passes
from corematching.policies.core import pick_top
from corematching.policies.passes import count_positive, dot_tokens, mark_largest, sum_tokens

WIDTH = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few_values = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 0.5, 2.0, 3.0])


@pytest.fixture(params=[1, 4 * 3 * WIDTH, 1 << 20])
def block_bytes(request, monkeypatch):
    """Blocks of one token, of three, and of all."""
    monkeypatch.setattr(passes, "BLOCK_BYTES", request.param)


def random_activations(dtype, tokens=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, WIDTH, generator=generator).to(dtype)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_sums_and_products_are_those_of_the_whole(dtype):
    values = random_activations(torch.float32) > 0 if dtype == torch.bool else None
    values = random_activations(dtype) if values is None else values
    tokens = torch.arange(14).view(2, 7) % 3 > 0
    weights = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    whole = values.float() * tokens.unsqueeze(-1)
    torch.testing.assert_close(sum_tokens(values, tokens), whole.sum(1))
    torch.testing.assert_close(sum_tokens(values, tokens, absolute=True), whole.abs().sum(1))
    expected = torch.einsum("btf,bf->bt", values.float(), weights)
    torch.testing.assert_close(dot_tokens(values, weights), expected)


@pytest.mark.usefixtures("block_bytes")
def test_tokens_that_do_not_count_may_hold_anything():
    values = torch.full((1, 4, 3), torch.nan)
    values[0, 2] = 5.0
    tokens = torch.tensor([[False, False, True, False]])
    assert sum_tokens(values, tokens).tolist() == [[5.0] * 3]


def test_sums_are_float32_whatever_the_default_dtype():
    values = torch.ones(1, 300, 2, dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        total = sum_tokens(values, torch.ones(1, 300, dtype=torch.bool))
    finally:
        torch.set_default_dtype(before)
    assert total.dtype == torch.float32 and total.tolist() == [[300.0, 300.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [True, False])
def test_marks_down_to_the_tokens_own_place(dtype, absolute):
    values = random_activations(dtype)
    counts = torch.arange(14).view(2, 7, 1)
    marked = mark_largest(values, counts, most=WIDTH, absolute=absolute)
    sizes = values.abs() if absolute else values
    for token, count, row in zip(
        sizes.flatten(0, 1), counts.flatten(), marked.flatten(0, 1), strict=True
    ):
        cut = token.sort(descending=True).values[max(int(count), 1) - 1]
        assert torch.equal(row, (token >= cut) & (token > 0))


@given(arrays(np.float32, (1, 3, 9), elements=few_values), st.integers(0, 12), st.booleans())
def test_marks_ties_and_never_zeros(a, count, absolute):
    values = torch.from_numpy(a)
    marked = mark_largest(values, torch.full((1, 3, 1), count), most=9, absolute=absolute)
    sizes = values.abs() if absolute else values
    cut = sizes.sort(dim=-1, descending=True).values[..., min(max(count, 1), 9) - 1, None]
    assert torch.equal(marked, (sizes >= cut) & (sizes > 0))


def test_marks_through_strides_and_leaves_its_input_alone():
    values = random_activations(torch.float32).transpose(0, 1)[..., ::2]
    before, counts = values.clone(), torch.full((7, 2, 1), 3)
    expected = mark_largest(values.contiguous(), counts, most=3, absolute=True)
    assert torch.equal(mark_largest(values, counts, most=3, absolute=True), expected)
    assert torch.equal(values, before)


def test_counts_positive_entries():
    values = torch.tensor([[[1.0, -1.0, 0.0], [2.0, 3.0, 0.5], [-1.0, -0.0, -2.0]]])
    assert count_positive(values).tolist() == [[[1], [3], [0]]]


@given(arrays(np.float32, (2, 9), elements=few_values), st.integers(1, 9))
def test_picks_as_a_stable_sort_does(a, count):
    scores = torch.from_numpy(a)
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    for given_as in (scores, scores.bfloat16(), (scores * 4).long()):
        assert torch.equal(pick_top(given_as, count), order.sort(dim=-1).values)


def test_picks_among_scores_that_are_nan():
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0]])
    assert pick_top(scores, 2).tolist() == [[1, 2]]
