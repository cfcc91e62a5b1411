"""What Triton chooses from a prompt, against PyTorch; `test_triton.py` runs this file."""

import pytest
import torch

from corematching.backends.cuda import triton_statistics
from corematching.backends.cuda.triton_statistics import (
    find_size,
    mark_highest,
    mark_top_positive,
    pick_highest,
    sum_rows,
    weigh_marks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHATS = ("values", "sizes", "unit squares")


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def some_tokens(batch, length):
    return (torch.arange(batch * length, device=DEVICE).view(batch, length) % 4) != 1


SMALL, LARGE = (1, 5, 37), (2, 66, 70)  # the large ones have more than one block
SUMS = [
    *((dtype, what, SMALL) for dtype in (*DTYPES, torch.bool) for what in WHATS),
    (torch.float32, "values", LARGE),
    (torch.float16, "sizes", LARGE),
    (torch.bfloat16, "unit squares", LARGE),
    (torch.bool, "values", LARGE),
]


@pytest.mark.parametrize(("dtype", "what", "shape"), SUMS)
def test_sums(dtype, what, shape):
    batch, length, width = shape
    values = draw(batch, length, width)
    values = values > 0.3 if dtype == torch.bool else values.to(dtype)
    values[:, 2] = 0
    tokens = some_tokens(batch, length)
    wide = values.double() * tokens.unsqueeze(-1)
    squares = wide.square() / wide.square().sum(-1, keepdim=True).clamp(min=1e-24)
    expected = {"values": wide, "sizes": wide.abs(), "unit squares": squares}[what].sum(1)
    found = sum_rows(values, tokens, what)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if shape == SMALL:
        assert torch.equal(found, sum_rows(values, tokens, what))


@pytest.mark.parametrize("what", WHATS)
def test_values_that_do_not_count_are_not_read(what):
    values = draw(2, 6, 40)
    tokens = some_tokens(2, 6)
    values[~tokens] = torch.nan
    assert bool(sum_rows(values, tokens, what).isfinite().all())


def test_weights_of_marks():
    marks, weights = draw(2, 5, 1500) > 0, draw(2, 1500, seed=1)
    expected = torch.einsum("btf,bf->bt", marks.double(), weights.double())
    torch.testing.assert_close(weigh_marks(marks, weights).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "absolute"), [(1, True), (37, True), (37, False), (64, False)])
def test_marks(dtype, absolute, width):
    values = draw(2, 4, width).mul(4).round().div(4).to(dtype)  # with ties and zeros
    counts = torch.tensor([0, 1, 2, 5, 17, 36, 50, 64], device=DEVICE)
    counts = counts.view(2, 4, 1).clamp(1, width)
    sizes = values.abs() if absolute else values
    cuts = sizes.sort(dim=-1, descending=True).values.gather(-1, counts - 1)
    found = mark_highest(values, counts, absolute)
    assert torch.equal(found, (sizes >= cuts) & (sizes > 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [0.2, 1.0])
def test_marks_of_positive_entries(dtype, rho):
    values = draw(2, 9, 64).mul(4).round().div(4).to(dtype)
    values[0, :2] = -values[0, :2].abs()
    found = mark_top_positive(values, round(rho * 1_000_000))
    counts = ((values > 0).sum(-1, keepdim=True) - 1).mul(rho).floor().long() + 1
    assert torch.equal(found, mark_highest(values, counts.clamp(min=1), False))
    assert torch.equal(mark_highest(values, 5, True), mark_highest(values, counts * 0 + 5, True))


@pytest.mark.parametrize("width", [1, 37, 64, 1500])
@pytest.mark.parametrize("batch", [1, 3])
def test_picks_as_a_stable_sort_does(width, batch):
    scores = draw(batch, width).mul(2).round().div(2)
    scores[scores == 0.5] = -0.0
    scores[:, -1] = -torch.inf
    order = scores.argsort(dim=-1, descending=True, stable=True)
    for count in {1, width // 3 + 1, width}:
        found = pick_highest(scores, count)
        assert torch.equal(found, order[:, :count].sort(dim=-1).values)


def test_nan_is_the_highest_score():
    scores = torch.tensor([[1.0, torch.nan, torch.inf, 2.0]], device=DEVICE)
    scores[0, 1] = -scores[0, 1]
    assert pick_highest(scores, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [True, False])
def test_sizes_at_a_rank(dtype, chosen):
    values, tokens = draw(2, 6, 50, dtype=dtype), some_tokens(2, 6)
    values[0, 0, :30] = values[0, 0, 30]
    values[~tokens] = torch.nan
    neurons = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(2)]).to(DEVICE)
    for share in (0.01, 0.6):
        found = torch.tensor([0, 0])
        expected = []
        for sample in range(2):
            rows = values[sample, tokens[sample]]
            rows = rows[:, neurons[sample]] if chosen else rows
            entries = rows.float().abs().flatten().sort().values
            rank = max(1, round(share * len(entries)))
            found[sample] = rank
            expected.append(float(entries[rank - 1]))
        sizes = find_size(values, tokens, neurons if chosen else None, found.to(DEVICE))
        assert sizes.tolist() == expected


def test_a_sample_without_tokens_has_size_0():
    values, tokens = draw(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    assert find_size(values, tokens, None, tokens.sum(1)).tolist() == [0, 0]


def test_what_cannot_be_read_is_left_to_pytorch(monkeypatch):
    tokens = torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    assert sum_rows(draw(1, 4, 3).transpose(1, 2), tokens, "values") is None
    assert sum_rows(draw(1, 3, 4).double(), tokens, "values") is None
    assert find_size(draw(1, 4, 3).transpose(1, 2), tokens, None, tokens.sum(1)) is None
    monkeypatch.setattr(triton_statistics, "WIDEST", 8)
    assert pick_highest(draw(1, 9), 2) is None
    assert mark_highest(draw(1, 1, 9), torch.ones(1, 1, 1, dtype=torch.long), True) is None
