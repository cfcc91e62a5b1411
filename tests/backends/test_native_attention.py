"""Attention on matrix tiles is the softmax that the formula says, under every kind of mask."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import TiledAttention, has_tiles, refuse_attention

BF16 = torch.bfloat16
ROUNDING = 4e-3
"""Relative error of weights and results that are rounded to bfloat16."""

tiled = pytest.mark.skipif(not has_tiles(), reason="this processor has no matrix tiles (AMX)")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(batch, heads, groups, length, stored, size):
    """Queries inside of a qkv tensor, as projections leave them, keys and values apart."""
    qkv = torch.randn(batch, length, heads + 2, size).to(BF16)
    key = torch.randn(batch, groups, stored, size).to(BF16)
    value = torch.randn(batch, stored, groups, size).to(BF16).transpose(1, 2)
    return qkv.transpose(1, 2)[:, :heads], key, value


def exact(query, key, value, mask, scaling, causal):
    query, key, value = query.double(), key.double(), value.double()
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return (scores.softmax(-1) @ value).transpose(1, 2)


def make_mask(kind, batch, length, stored):
    if kind == "bool":
        mask = torch.rand(batch, 1, length, stored) > 0.4
        return mask | torch.eye(length, stored, dtype=torch.bool)
    lowest = torch.finfo(BF16).min
    if kind == "causal":
        hidden = torch.ones(length, stored).triu(1 + stored - length).bool()
        return torch.zeros(batch, 1, length, stored, dtype=BF16).masked_fill(hidden, lowest)
    if kind == "one for all":
        mask = torch.randn(1, 1, length, stored).to(BF16)
        return mask.masked_fill(torch.rand(1, 1, length, stored) > 0.8, lowest)
    return torch.randn(batch, 1, 1, stored).to(BF16) if kind == "rows alike" else None


def error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


@tiled
@pytest.mark.parametrize("length", [1, 2, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 32), (9, 3, 64), (2, 1, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(length, heads, groups, size, causal):
    query, key, value = draw(2, heads, groups, length, length, size)
    assert refuse_attention(query, key, value, None) is None
    out = TiledAttention().attend(query, key, value, None, size**-0.5, causal)
    assert out.shape == (2, length, heads, size) and out.dtype == BF16
    assert error(out, exact(query, key, value, None, size**-0.5, causal)) < ROUNDING


@tiled
@pytest.mark.parametrize("kind", ["bool", "causal", "one for all", "rows alike"])
@pytest.mark.parametrize(("length", "stored"), [(5, 9), (40, 40), (33, 150)])
def test_masks(kind, length, stored):
    query, key, value = draw(3, 4, 2, length, stored, 64)
    mask = make_mask(kind, 3, length, stored)
    assert refuse_attention(query, key, value, mask) is None
    out = TiledAttention().attend(query, key, value, mask, 0.125, False)
    assert error(out, exact(query, key, value, mask, 0.125, False)) < ROUNDING


@tiled
@pytest.mark.parametrize("dtype", [torch.bool, BF16])
def test_who_sees_nobody_gives_numbers(dtype):
    """Padding in front of a prompt: what it gives goes nowhere, but NaN would."""
    query, key, value = draw(1, 2, 1, 6, 6, 32)
    mask = make_mask("causal", 1, 6, 6)
    mask[:, :, :2] = torch.finfo(BF16).min
    mask = mask == 0 if dtype == torch.bool else mask
    out = TiledAttention().attend(query, key, value, mask, 0.2, False)
    assert out.isfinite().all()
    theirs = exact(query[:, :, 2:], key, value, mask[:, :, 2:], 0.2, False)
    assert error(out[:, 2:], theirs) < ROUNDING


@tiled
def test_what_is_not_finite_stays_in_its_query():
    query, key, value = draw(1, 2, 1, 40, 40, 32)
    query = query.clone()
    query[0, 1, 7, 3] = torch.nan
    out = TiledAttention().attend(query, key, value, None, 0.2, True)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = 0
    assert out.isfinite().all()


@tiled
def test_large_scores_do_not_overflow():
    query, key, value = draw(1, 1, 1, 20, 20, 32)
    query, key = query * 30, key * 30
    out = TiledAttention().attend(query, key, value, None, 1.0, True)
    assert error(out, exact(query, key, value, None, 1.0, True)) < ROUNDING


@tiled
def test_the_same_for_any_number_of_threads():
    query, key, value = draw(2, 3, 1, 70, 70, 64)
    attention, before, outs = TiledAttention(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(attention.attend(query, key, value, None, 0.125, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@tiled
def test_scratch_memory_grows_and_is_kept():
    attention = TiledAttention()
    for length in (5, 200, 5):
        query, key, value = draw(1, 2, 2, length, length, 32)
        out = attention.attend(query, key, value, None, 0.2, True)
        assert error(out, exact(query, key, value, None, 0.2, True)) < ROUNDING


def test_others_are_refused():
    query, key, value = draw(2, 4, 2, 8, 8, 32)
    mask = make_mask("bool", 2, 8, 8)
    if not has_tiles():
        assert refuse_attention(query, key, value, None) == "there are no matrix tiles"
        return
    assert refuse_attention(query, key, value, mask) is None
    bad = [
        (query.float(), key, value, None),
        (query, key[:, :, :4], value, None),
        (query[..., :16], key[..., :16], value[..., :16], None),
        (query[:, :3], key, value, None),
        (query[:1], key, value, None),
        (query, key.transpose(2, 3), value, None),
        (query, key, value, mask.float()),
        (query, key, value, mask[:, :, :, :4]),
        (query, key, value, mask[:, 0]),
        (query, key[:, :, :0], value[:, :, :0], None),
    ]
    assert all(refuse_attention(*inputs) for inputs in bad)
