"""Cuts by Triton, against PyTorch; `test_triton.py` runs this file."""

import pytest
import torch

from corematching.backends.cuda import triton_selection
from corematching.backends.cuda.triton_selection import (
    credit_nearest,
    keep_highest,
    line_up,
    weigh_rarity,
)
from corematching.backends.cuda.triton_statistics import sum_both, sum_rows
from corematching.cache.masks import survivors
from corematching.policies.budgets import Count, Ratio
from corematching.policies.proportional import count_alike

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def masks(batch, length):
    """Padding in front of all samples but the first, images in between; none in a third one."""
    valid = torch.arange(length, device=DEVICE) >= 3 * torch.arange(batch, device=DEVICE)[:, None]
    image = valid & (torch.arange(length, device=DEVICE) % 7 > 1)
    image[:, -4:] = False
    if batch > 2:
        image[-1] = False
    return valid, image


@pytest.mark.parametrize("cover", [0.0, 0.9])
@pytest.mark.parametrize("budget", [Ratio, Count])
@pytest.mark.parametrize(("batch", "length"), [(1, 40), (3, 70)])
def test_a_cut_keeps_what_the_budget_keeps(budget, batch, length, cover):
    valid, image = masks(batch, length)
    scores = draw(batch, length).mul(2).round().div(2)
    scores[scores == 0.5] = -0.0
    scores = torch.where(image, scores, torch.nan)
    budget = budget(0.3, cover=cover) if budget is Ratio else budget(5, cover=cover)
    present = image.sum(1).tolist()
    counts = [min(budget.bound_known(budget.known_count(n), n), n) for n in present]
    found = keep_highest(scores, image, valid, counts, present, cover)
    kept = budget(scores.cpu(), image.cpu()).to(DEVICE)
    assert torch.equal(found.kept, kept)
    assert torch.equal(found.keep, kept | (valid & ~image))
    assert not found.broken.any()
    assert counts == kept.sum(1).tolist()
    for sample, (count, all_) in enumerate(zip(counts, present, strict=True)):
        assert found.listed[sample, :count].tolist() == kept[sample].nonzero().flatten().tolist()
        gone = (image & ~kept)[sample].nonzero().flatten()
        behind = found.listed[sample, found.most :]
        assert behind[: all_ - count].tolist() == gone.tolist()
        assert not behind[all_ - count :].any()
        highest = scores[sample][gone].max() if len(gone) else -torch.inf
        own = scores[sample][kept[sample] & (scores[sample] >= highest)]
        assert len(own) == 0 or float(found.cut[sample]) == float(own.min())


def test_broken_scores_count_as_equal():
    valid, image = masks(2, 30)
    scores = draw(2, 30)
    scores[0, 3] = torch.nan
    found = keep_highest(scores, image, valid, (4, 4), image.sum(1).tolist())
    assert found.broken.tolist() == [True, False]
    assert found.kept[0].nonzero().flatten().tolist() == image[0].nonzero().flatten()[:4].tolist()
    assert found.cut.isnan().tolist() == [True, False]


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_survivors_line_up(batch, weighed):
    valid, image = masks(batch, 50)
    keep = draw(batch, 50) > 0.4
    weights = draw(batch, 50).abs() + 0.5 if weighed else None
    stays = (keep & valid) | (valid & ~image)
    order, present = survivors(stays)
    origin = 100 + torch.arange(50, device=DEVICE).expand(batch, -1)
    found = line_up(keep, valid, image, origin, weights, order.shape[1])
    assert torch.equal(found.keep, stays)
    assert torch.equal(found.order, order)
    assert torch.equal(found.valid, present)
    assert torch.equal(found.image, image.gather(1, order) & present)
    assert torch.equal(found.origin, origin.gather(1, order))
    if weighed:
        assert torch.equal(found.weights, weights.gather(1, order))
        torch.testing.assert_close(found.log_weights, found.weights.log())
    else:
        assert found.weights is None and found.log_weights is None


@pytest.mark.parametrize("batch", [1, 3])
def test_dropped_tokens_count_to_the_nearest(batch):
    valid, image = masks(batch, 60)
    features, weights = draw(batch, 60, 12), draw(batch, 60, seed=1).abs() + 0.5
    present = image.sum(1).tolist()
    counts = [min(6 + i, n) for i, n in enumerate(present)]
    kept = keep_highest(draw(batch, 60, seed=2), image, valid, counts, present)
    listed = features.gather(1, kept.listed[..., None].expand(-1, -1, 12))
    targets, rows = listed[:, : kept.most], listed[:, kept.most :]
    expected = count_alike(features, image, kept.kept, weights)
    after = weights.clone()
    for first in range(0, rows.shape[1], 9):
        products = (rows[:, first : first + 9] @ targets.mT).contiguous()
        assert credit_nearest(products, targets.norm(dim=-1), kept, after, first)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_rarity(power):
    marks, (valid, image) = draw(2, 70, 100) > 0.2, masks(2, 70)
    chosen = valid & ~image
    marks[:, :, 3] = True
    counts = (marks & chosen[..., None]).sum(1)
    users = (marks & image[..., None]).sum(1)
    rarity = ((1 + image.sum(1, keepdim=True)) / (0.5 + users)).log().clamp(min=0)
    found = weigh_rarity(marks, chosen, image, power)
    torch.testing.assert_close(found, rarity**power * counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 4, 32])
def test_both_sums(parts, dtype):
    values, (valid, image) = draw(2, 21, 100).to(dtype), masks(2, 21)
    values[~valid] = torch.nan
    out = torch.full((2, parts, 2, 100), torch.nan, device=DEVICE)
    assert sum_both(values, valid & ~image, valid, out)
    for found, tokens, what in zip(
        out.sum(1), (valid & ~image, valid), ("unit squares", "values"), strict=True
    ):
        torch.testing.assert_close(found, sum_rows(values, tokens, what))


def test_what_cannot_be_read_is_left_to_pytorch(monkeypatch):
    valid, image = masks(1, 30)
    assert weigh_rarity(draw(1, 30, 4), valid, image, 1.0) is None
    assert keep_highest(draw(1, 30).half(), image, valid, (2,), image.sum(1).tolist()) is None
    monkeypatch.setattr(triton_selection, "WIDEST", 8)
    assert keep_highest(draw(1, 30), image, valid, (2,), image.sum(1).tolist()) is None
    assert line_up(valid, valid, image, image.long(), None, 20) is None
