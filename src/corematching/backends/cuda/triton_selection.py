"""Choosing image tokens as Triton kernels; `backends.kernels.selection` has the contract.

One program holds one sample's row of tokens, so a cut is one launch for the choice and one for the
order of what is left.

Shapes: B samples, T tokens, F neurons, K survivors.
"""

# ruff: noqa: N803 - Triton's constants are written in capitals

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from corematching import devices
from corematching.backends.cuda.triton_rows import (
    LOWEST,
    WIDEST,
    as_bytes,
    is_readable,
    on_device,
    size_row,
)
from corematching.backends.kernels.selection import Kept, Survivors

INFINITE = tl.constexpr(0x7F800000)


def weigh_rarity(marks: Tensor, chosen: Tensor, image: Tensor, power: float) -> Tensor | None:
    """Counts times rarity, of each neuron; one launch."""
    if not is_readable(marks, torch.bool):
        return None
    batch, length, width = marks.shape
    out = torch.empty(batch, width, dtype=torch.float32, device=marks.device)
    masks = as_bytes(chosen.contiguous()), as_bytes(image.contiguous())
    with on_device(marks):
        _weigh_rarity_kernel[(triton.cdiv(width, 64), batch)](
            as_bytes(marks), *masks, out, length, width, power, PLAIN=power == 1,
            BLOCK_T=64, BLOCK_F=64,
        )  # fmt: skip
    return out


def keep_highest(
    scores: Tensor,
    image: Tensor,
    valid: Tensor,
    counts: Sequence[int],
    present: Sequence[int],
    cover: float = 0.0,
    even: Tensor | None = None,
) -> Kept | None:
    """The image tokens that stay, and lists of both kinds; one launch."""
    if not is_readable(scores, torch.float32) or scores.shape[1] > WIDEST:
        return None
    batch, length = scores.shape
    numbers = np.array(counts, dtype=np.int64)
    spread = np.round(numbers.astype(np.float32) * np.float32(cover))
    known = np.stack([numbers, spread.astype(np.int64), np.array(present, dtype=np.int64)])
    most = max(counts), max(p - c for c, p in zip(counts, present, strict=True))
    kept, keep = (torch.empty_like(image, memory_format=torch.contiguous_format) for _ in range(2))
    found = Kept(
        kept,
        keep,
        torch.empty(batch, dtype=torch.float32, device=scores.device),
        torch.empty(batch, dtype=torch.bool, device=scores.device),
        torch.empty(batch, sum(most), dtype=torch.long, device=scores.device),
        most[0],
        devices.upload(known, scores.device),
    )
    masks = [as_bytes(x.contiguous()) for x in (image, valid)]
    with on_device(scores):
        _keep_highest_kernel[(batch,)](
            scores, *masks, None if even is None else as_bytes(even.contiguous()), found.numbers,
            as_bytes(kept), as_bytes(keep), found.cut, as_bytes(found.broken), found.listed, length,
            *most, SPREAD=bool(cover) and even is None, **size_row(length),
        )  # fmt: skip
    return found


def credit_nearest(products: Tensor, norms: Tensor, kept: Kept, given: Tensor, first: int) -> bool:
    """Each dropped token's weight to the kept one most like it; one launch."""
    batch, rows, most = products.shape
    if not is_readable(products, torch.float32) or most > WIDEST:
        return False
    with on_device(products):
        _credit_kernel[(rows, batch)](
            products, norms, kept.numbers[0], kept.listed, given, kept.numbers[2], given.shape[1],
            rows, first, most, kept.listed.shape[1], **size_row(most),
        )  # fmt: skip
    return True


def line_up(
    keep: Tensor, valid: Tensor, image: Tensor, origin: Tensor, weights: Tensor | None, most: int
) -> Survivors | None:
    """The order of what stays, with all that is gathered by it; one launch."""
    if not is_readable(keep, torch.bool) or keep.shape[1] > WIDEST:
        return None
    (batch, length), device = keep.shape, keep.device
    longs = [torch.empty(batch, most, dtype=torch.long, device=device) for _ in range(2)]
    bools = [torch.empty(batch, most, dtype=torch.bool, device=device) for _ in range(2)]
    floats: list[Tensor | None] = [None, None]
    if weights is not None:
        weights = weights.float().contiguous()
        floats = [torch.empty(batch, most, dtype=torch.float32, device=device) for _ in range(2)]
    stays = torch.empty_like(keep)
    masks = [as_bytes(x.contiguous()) for x in (keep, valid, image)]
    with on_device(keep):
        _line_up_kernel[(batch,)](
            *masks, origin.contiguous(), weights, as_bytes(stays), *longs,
            *(as_bytes(x) for x in bools), *floats, length, most, **size_row(length),
        )  # fmt: skip
    return Survivors(stays, longs[0], bools[0], bools[1], longs[1], *floats)


@triton.jit
def _weigh_rarity_kernel(
    marks: tl.tensor, chosen: tl.tensor, image: tl.tensor, out: tl.tensor, length: tl.tensor,
    width: tl.tensor, power: tl.tensor, PLAIN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:  # fmt: skip
    """The weights of BLOCK_F neurons of one sample."""
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    sample = tl.program_id(1).to(tl.int64)
    inside = columns < width
    count = tl.zeros([BLOCK_F], tl.float32)
    users = tl.zeros([BLOCK_F], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, length, BLOCK_T):
        positions = first + tl.arange(0, BLOCK_T)
        rows = sample * length + positions
        there = positions < length
        voter = tl.load(chosen + rows, mask=there, other=0).to(tl.float32)
        patch = tl.load(image + rows, mask=there, other=0).to(tl.float32)
        block = tl.load(
            marks + rows[:, None] * width + columns[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        ).to(tl.float32)
        count += tl.sum(block * voter[:, None], axis=0)
        users += tl.sum(block * patch[:, None], axis=0)
        total += patch
    rarity = tl.maximum(tl.log((1.0 + tl.sum(total, axis=0)) / (0.5 + users)), 0.0)
    if not PLAIN:
        rarity = tl.where(rarity > 0, tl.exp(power * tl.log(rarity)), 0.0)
    tl.store(out + sample * width + columns, rarity * count, mask=inside)


@triton.jit
def _keep_highest_kernel(
    scores: tl.tensor, image: tl.tensor, valid: tl.tensor, even: tl.tensor, counts: tl.tensor,
    kept: tl.tensor, keep: tl.tensor, lowest: tl.tensor, broken: tl.tensor, listed: tl.tensor,
    length: tl.tensor, most_kept: tl.tensor, most_gone: tl.tensor,
    SPREAD: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The choice among one sample's image tokens, by a radix select of the last one that stays."""
    sample = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    inside = tokens < length
    here = sample * length + tokens
    patch = tl.load(image + here, mask=inside, other=0) != 0
    present = tl.load(valid + here, mask=inside, other=0) != 0
    count = tl.load(counts + sample).to(tl.int32)
    score = tl.load(scores + here, mask=patch, other=0.0)
    finite = (score == score) & (tl.abs(score) < float("inf"))
    bad = tl.sum((patch & ~finite).to(tl.int32), axis=0) > 0
    score = tl.where(bad | (score == 0), 0.0, score)  # -0 counts as 0
    bits = score.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that sort like the floats
    if even is not None:
        keys = tl.where(tl.load(even + here, mask=inside, other=0) != 0, INFINITE, keys)
    if SPREAD:
        spread = tl.load(counts + tl.num_programs(0) + sample)
        index = tl.cumsum(patch.to(tl.int32), axis=0).to(tl.int64)
        total = tl.maximum(tl.sum(patch.to(tl.int64), axis=0), 1)
        ahead = (2 * index * spread + total) // (2 * total)
        behind = (2 * tl.maximum(index - 1, 0) * spread + total) // (2 * total)
        keys = tl.where(ahead > behind, INFINITE, keys)
    keys = tl.where(patch, keys, LOWEST)
    cut = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= count, 0, LOWEST)
    for step in range(31):
        higher = cut | (1 << (30 - step))
        reached = tl.sum((keys >= higher).to(tl.int32), axis=0)
        cut = tl.where(reached >= count, higher, cut)
    equal = ((keys == cut) & patch).to(tl.int32)
    above = ((keys > cut) & patch).to(tl.int32)
    missing = count - tl.sum(above, axis=0)
    stays = (above | (equal & (tl.cumsum(equal, axis=0) <= missing).to(tl.int32))) != 0
    stays = stays & (count > 0)
    gone = patch & ~stays
    best = tl.max(tl.where(gone, score, -float("inf")), axis=0)
    least = tl.min(tl.where(stays & (score >= best), score, float("inf")), axis=0)
    least = tl.where(bad | (least == float("inf")), float("nan"), least)
    tl.store(kept + here, stays.to(tl.uint8), mask=inside)
    tl.store(keep + here, (present & (stays | ~patch)).to(tl.uint8), mask=inside)
    tl.store(lowest + sample, least)
    tl.store(broken + sample, bad.to(tl.uint8))
    start = listed + sample * (most_kept + most_gone)
    ones = stays.to(tl.int32)
    slot = tl.cumsum(ones, axis=0) - 1
    tl.store(start + slot, tokens.to(tl.int64), mask=stays)
    blank = (tokens >= tl.sum(ones, axis=0)) & (tokens < most_kept)
    tl.store(start + tokens, tl.zeros([BLOCK], tl.int64), mask=blank)
    ones = gone.to(tl.int32)
    slot = most_kept + tl.cumsum(ones, axis=0) - 1
    tl.store(start + slot, tokens.to(tl.int64), mask=gone)
    blank = (tokens >= tl.sum(ones, axis=0)) & (tokens < most_gone)
    tl.store(start + most_kept + tokens, tl.zeros([BLOCK], tl.int64), mask=blank)


@triton.jit
def _credit_kernel(
    products: tl.tensor, norms: tl.tensor, counts: tl.tensor, listed: tl.tensor, given: tl.tensor,
    image: tl.tensor, length: tl.tensor, rows: tl.tensor, first: tl.tensor, most: tl.tensor,
    stride: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One dropped token: what it counts for goes to the kept one with the highest cosine."""
    row = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    kept = tl.load(counts + sample)
    gone = tl.load(image + sample) - kept
    inside = columns < kept
    product = tl.load(
        products + (sample * rows + row) * most + columns, mask=inside, other=-float("inf")
    )
    norm = tl.load(norms + sample * most + columns, mask=inside, other=1.0)
    likeness = tl.where(inside, product / tl.maximum(norm, 1e-12), -float("inf"))
    nearest = tl.argmax(likeness, axis=0)
    if first + row < gone:
        start = listed + sample * stride
        token = tl.load(start + most + first + row)
        target = tl.load(start + nearest)
        weight = tl.load(given + sample * length + token)
        tl.atomic_add(given + sample * length + target, weight)


@triton.jit
def _line_up_kernel(
    keep: tl.tensor, valid: tl.tensor, image: tl.tensor, origin: tl.tensor, weights: tl.tensor,
    stays: tl.tensor, order: tl.tensor, new_origin: tl.tensor, new_valid: tl.tensor,
    new_image: tl.tensor, new_weights: tl.tensor, logs: tl.tensor, length: tl.tensor,
    most: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The survivors of one sample behind its last dropped columns, which fill what is short."""
    sample = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    inside = tokens < length
    here = sample * length + tokens
    patch = tl.load(image + here, mask=inside, other=0) != 0
    wanted = tl.load(keep + here, mask=inside, other=0) != 0
    alive = (tl.load(valid + here, mask=inside, other=0) != 0) & (wanted | ~patch)
    tl.store(stays + here, alive.to(tl.uint8), mask=inside)
    ones, zeros = alive.to(tl.int32), (inside & ~alive).to(tl.int32)
    filler = most - tl.sum(ones, axis=0)
    behind = tl.cumsum(ones, axis=0) - 1 + filler
    ahead = tl.cumsum(zeros, axis=0) - 1 - (tl.sum(zeros, axis=0) - filler)
    slot = tl.where(alive, behind, ahead)
    fits = inside & (slot >= 0) & (slot < most)
    there = sample * most + slot
    tl.store(order + there, tokens.to(tl.int64), mask=fits)
    tl.store(new_origin + there, tl.load(origin + here, mask=fits, other=0), mask=fits)
    tl.store(new_valid + there, alive.to(tl.uint8), mask=fits)
    tl.store(new_image + there, (alive & patch).to(tl.uint8), mask=fits)
    if weights is not None:
        weight = tl.load(weights + here, mask=fits, other=1.0)
        tl.store(new_weights + there, weight, mask=fits)
        tl.store(logs + there, tl.log(weight), mask=fits)
