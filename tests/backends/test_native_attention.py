"""Attention of prompts is the softmax that the formula says, under every kind of mask."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.cpu.native import PrefillAttention, why_unsupported_attention

BF16 = torch.bfloat16
ROUNDING = {BF16: 4e-3, torch.float32: 2e-6}
"""Relative error of weights and results that are rounded to the dtype."""

each_dtype = pytest.mark.parametrize("dtype", ROUNDING)
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(batch, heads, kv_heads, length, keys, size, dtype=BF16):
    """Queries inside of a qkv tensor, as projections leave them, keys and values apart."""
    qkv = torch.randn(batch, length, heads + 2, size).to(dtype)
    key = torch.randn(batch, kv_heads, keys, size).to(dtype)
    value = torch.randn(batch, keys, kv_heads, size).to(dtype).transpose(1, 2)
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


def make_mask(kind, batch, length, keys, dtype=BF16):
    if kind == "bool":
        mask = torch.rand(batch, 1, length, keys) > 0.4
        return mask | torch.eye(length, keys, dtype=torch.bool)
    lowest = torch.finfo(dtype).min
    if kind == "causal":
        hidden = torch.ones(length, keys).triu(1 + keys - length).bool()
        return torch.zeros(batch, 1, length, keys, dtype=dtype).masked_fill(hidden, lowest)
    if kind == "one for all":
        mask = torch.randn(1, 1, length, keys).to(dtype)
        return mask.masked_fill(torch.rand(1, 1, length, keys) > 0.8, lowest)
    return torch.randn(batch, 1, 1, keys).to(dtype) if kind == "rows alike" else None


def error(ours, theirs):
    return float((ours.double() - theirs).norm() / theirs.norm())


@each_dtype
@pytest.mark.parametrize("length", [1, 2, 17, 32, 100, 270])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 32), (9, 3, 64), (2, 1, 128), (3, 3, 72), (2, 2, 8)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dtype, length, heads, kv_heads, size, causal):
    query, key, value = draw(2, heads, kv_heads, length, length, size, dtype)
    assert why_unsupported_attention(query, key, value, None) is None
    out = PrefillAttention().attend(query, key, value, None, size**-0.5, causal)
    assert out.shape == (2, length, heads, size) and out.dtype == dtype
    assert error(out, exact(query, key, value, None, size**-0.5, causal)) < ROUNDING[dtype]


@each_dtype
@pytest.mark.parametrize("kind", ["bool", "causal", "one for all", "rows alike"])
@pytest.mark.parametrize(("length", "keys"), [(5, 9), (40, 40), (33, 150), (70, 600)])
def test_masks(dtype, kind, length, keys):
    query, key, value = draw(3, 4, 2, length, keys, 64, dtype)
    mask = make_mask(kind, 3, length, keys, dtype)
    assert why_unsupported_attention(query, key, value, mask) is None
    out = PrefillAttention().attend(query, key, value, mask, 0.125, False)
    assert error(out, exact(query, key, value, mask, 0.125, False)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bool, BF16])
def test_who_sees_nobody_gives_numbers(dtype):
    """Padding in front of a prompt: what it gives goes nowhere, but NaN would."""
    query, key, value = draw(1, 2, 1, 6, 6, 32)
    mask = make_mask("causal", 1, 6, 6)
    mask[:, :, :2] = torch.finfo(BF16).min
    mask = mask == 0 if dtype == torch.bool else mask
    out = PrefillAttention().attend(query, key, value, mask, 0.2, False)
    assert out.isfinite().all()
    theirs = exact(query[:, :, 2:], key, value, mask[:, :, 2:], 0.2, False)
    assert error(out[:, 2:], theirs) < ROUNDING[BF16]


def test_what_is_not_finite_stays_in_its_query():
    query, key, value = draw(1, 2, 1, 40, 40, 32)
    query = query.clone()
    query[0, 1, 7, 3] = torch.nan
    out = PrefillAttention().attend(query, key, value, None, 0.2, True)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = 0
    assert out.isfinite().all()


def test_large_scores_do_not_overflow():
    query, key, value = draw(1, 1, 1, 20, 20, 32)
    query, key = query * 30, key * 30
    out = PrefillAttention().attend(query, key, value, None, 1.0, True)
    assert error(out, exact(query, key, value, None, 1.0, True)) < ROUNDING[BF16]


def test_the_same_for_any_number_of_threads():
    query, key, value = draw(2, 3, 1, 70, 70, 64)
    attention, before, outs = PrefillAttention(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(attention.attend(query, key, value, None, 0.125, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_scratch_memory_grows_and_is_kept():
    attention = PrefillAttention()
    for length in (5, 200, 5):
        query, key, value = draw(1, 2, 2, length, length, 32)
        out = attention.attend(query, key, value, None, 0.2, True)
        assert error(out, exact(query, key, value, None, 0.2, True)) < ROUNDING[BF16]


def test_others_are_refused():
    query, key, value = draw(2, 4, 2, 8, 8, 32)
    mask = make_mask("bool", 2, 8, 8)
    assert why_unsupported_attention(query, key, value, mask) is None
    bad = [
        (query.float(), key, value, None),
        (query.half(), key.half(), value.half(), None),
        (query, key[:, :, :4], value, None),
        (query[..., :12], key[..., :12], value[..., :12], None),
        (query[:, :3], key, value, None),
        (query[:1], key, value, None),
        (query, key.transpose(2, 3), value, None),
        (query, key, value, mask.float()),
        (query, key, value, mask[:, :, :, :4]),
        (query, key, value, mask[:, 0]),
        (query, key[:, :, :0], value[:, :, :0], None),
    ]
    assert all(why_unsupported_attention(*inputs) for inputs in bad)
