"""What is chosen from a prompt, against PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import (
    find_size,
    mark_highest,
    pick_highest,
    sum_rows,
    weigh_marks,
)

BF16 = torch.bfloat16
DTYPES = (torch.float32, BF16)
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("what", ["values", "sizes", "unit squares"])
def test_sums(dtype, batch, what):
    values = draw(batch, 9, 37, dtype=dtype)
    values[:, 4] = 0
    tokens = torch.arange(9 * batch).view(batch, 9) % 4 != 0
    wide = values.double() * tokens.unsqueeze(-1)
    squares = wide.square() / wide.square().sum(-1, keepdim=True).clamp(min=1e-24)
    expected = {"values": wide, "sizes": wide.abs(), "unit squares": squares}[what].sum(1)
    found = sum_rows(values, tokens, what)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_sums_do_not_depend_on_the_number_of_threads():
    values, tokens = draw(2, 50, 130, dtype=torch.bfloat16), torch.ones(2, 50, dtype=torch.bool)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sum_rows(values, tokens, "unit squares"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_values_that_do_not_count_are_not_read():
    values = draw(1, 4, 8)
    values[0, 2] = torch.nan
    tokens = torch.tensor([[True, True, False, True]])
    for what in ("values", "sizes", "unit squares"):
        assert bool(sum_rows(values, tokens, what).isfinite().all())


@pytest.mark.parametrize(
    "values",
    [torch.ones(1, 3, 4, dtype=torch.float16), torch.ones(1, 4, 3).transpose(1, 2)],
    ids=["float16", "transposed"],
)
def test_what_cannot_be_read_is_left_to_pytorch(values):
    assert sum_rows(values, torch.ones(1, 3, dtype=torch.bool), "values") is None


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


def test_no_highest_scores_among_nan_or_other_types():
    assert pick_highest(torch.tensor([[1.0, float("nan"), 2.0]]), 1) is None
    assert pick_highest(torch.tensor([[1, 2, 3]]), 1) is None


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


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_no_size_among_what_is_not_finite(odd):
    values, tokens = draw(1, 2, 9, dtype=BF16), torch.ones(1, 2, dtype=torch.bool)
    values[0, 1, 4] = odd
    assert find_size(values, tokens, None, torch.tensor([3])) is None
    assert find_size(values.half(), tokens, None, torch.tensor([3])) is None
