"""Statistics of a prompt as Triton kernels; `backends.kernels.statistics` has the contract.

They run between the prompt's matrix products, so each function needs only a few launches, never
waits for the device, and does not sort: order statistics are found by a radix select over bits, or
over histograms of digits.

Shapes: B samples, T tokens, F neurons.
"""

# ruff: noqa: N803 - Triton's constants are written in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corematching.backends.cuda.triton_rows import (
    FLOATS,
    LOWEST,
    TINY,
    WIDEST,
    as_bits,
    as_bytes,
    is_reachable,
    is_readable,
    on_device,
    size_row,
)

KINDS = {"values": 0, "sizes": 1, "unit squares": 2}
DIGITS = {2: ((0, 15),), 4: ((20, 11), (10, 10), (0, 10))}
"""By bytes of a float: the digits of its magnitude, highest first, as (shift, number of bits)."""


def sum_rows(values: Tensor, tokens: Tensor, what: str) -> Tensor | None:
    """A sum over each sample's tokens; two launches for ``unit squares``, else one."""
    if not is_readable(values, *FLOATS, torch.bool):
        return None
    batch, length, width = values.shape
    values, tokens = as_bytes(values), as_bytes(tokens.contiguous())
    out = torch.empty(batch, width, dtype=torch.float32, device=values.device)
    factors = None
    with on_device(values):
        if what == "unit squares":
            factors = torch.empty(batch, length, dtype=torch.float32, device=values.device)
            _invert_squares_kernel[(batch * length,)](values, tokens, factors, width, BLOCK=1024)
        _sum_rows_kernel[(triton.cdiv(width, 64), batch)](
            values, tokens, factors, out, length, width, KIND=KINDS[what], BLOCK_T=64, BLOCK_F=64
        )
    return out


def sum_both(values: Tensor, tokens: Tensor, valid: Tensor, out: Tensor) -> bool:
    """Unit squares and values in parts, each over some tokens; one launch."""
    if not is_readable(values, *FLOATS) or values.shape[-1] > WIDEST:
        return False
    batch, length, width = values.shape
    parts = out.shape[1]
    masks = as_bytes(tokens.contiguous()), as_bytes(valid.contiguous())
    with on_device(values):
        _sum_both_kernel[(parts, batch)](
            values, *masks, out, length, width, triton.cdiv(length, parts), **size_row(width)
        )
    return True


def weigh_marks(marks: Tensor, weights: Tensor) -> Tensor | None:
    """The sum of the marked entries' weights, for each token; one launch."""
    if not is_readable(marks, torch.bool):
        return None
    batch, length, width = marks.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=marks.device)
    with on_device(marks):
        _weigh_marks_kernel[(batch * length,)](
            as_bytes(marks), weights.float().contiguous(), out, length, width, BLOCK=1024
        )
    return out


def mark_highest(values: Tensor, counts: Tensor | int, absolute: bool) -> Tensor | None:
    """Mark each token's largest entries; one launch."""
    if isinstance(counts, int):
        return _mark(values, None, counts, absolute)
    return _mark(values, counts.expand(*values.shape[:-1], 1).contiguous(), 0, absolute)


def mark_top_positive(values: Tensor, ppm: int) -> Tensor | None:
    """Mark each token's largest positive entries; one launch."""
    return _mark(values, None, 0, False, ppm)


def _mark(
    values: Tensor, counts: Tensor | None, count: int, absolute: bool, ppm: int = 0
) -> Tensor | None:
    if not is_readable(values, *FLOATS) or values.shape[-1] > WIDEST:
        return None
    batch, length, width = values.shape
    marks = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    bits = 8 * values.element_size() - 1
    with on_device(values):
        _mark_highest_kernel[(batch * length,)](
            as_bits(values), counts, count, as_bytes(marks), width, PPM=ppm, ABSOLUTE=absolute,
            BITS=bits, MAGNITUDE=(1 << bits) - 1, **size_row(width),
        )  # fmt: skip
    return marks


def pick_highest(scores: Tensor, count: int) -> Tensor | None:
    """The indices of each row's highest scores; one launch."""
    batch, width = scores.shape
    if scores.dtype not in FLOATS or width > WIDEST or not is_reachable(scores):
        return None
    indices = torch.empty(batch, count, dtype=torch.long, device=scores.device)
    with on_device(scores):
        _pick_highest_kernel[(batch,)](
            scores.float().contiguous(), indices, width, count, **size_row(width)
        )
    return indices


def find_size(
    values: Tensor, tokens: Tensor, neurons: Tensor | None, ranks: Tensor
) -> Tensor | None:
    """The magnitude of a given rank; two launches for 16-bit floats, else six."""
    if not is_readable(values, *FLOATS):
        return None
    batch, length, width = values.shape
    bits, tokens = as_bits(values), as_bytes(tokens.contiguous())
    neurons = None if neurons is None else neurons.contiguous()
    listed = width if neurons is None else neurons.shape[1]
    known = torch.zeros(batch, dtype=torch.int32, device=values.device)
    missing = ranks.to(torch.int32)
    for shift, number in DIGITS[values.element_size()]:
        found = torch.zeros(batch, 1 << number, dtype=torch.int32, device=values.device)
        with on_device(values):
            _count_digits_kernel[(triton.cdiv(listed, 1024), length, batch)](
                bits, tokens, neurons, known, found, width, listed, SHIFT=shift, NUMBER=number,
                MAGNITUDE=(1 << 8 * values.element_size() - 1) - 1, BLOCK=1024,
            )  # fmt: skip
            _narrow_kernel[(batch,)](found, known, missing, NUMBER=number, num_warps=16)
    return known.to(bits.dtype).view(values.dtype).float()


@triton.jit
def _invert_squares_kernel(
    values: tl.tensor, tokens: tl.tensor, factors: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """1 / ||a(t)||^2 of each selected token."""
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(tokens + row) != 0
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = (columns < width) & counts
        value = tl.load(values + row * width + columns, mask=inside, other=0).to(tl.float32)
        total += value * value
    tl.store(factors + row, 1.0 / tl.maximum(tl.sum(total, axis=0), TINY))


@triton.jit
def _sum_rows_kernel(
    values: tl.tensor,
    tokens: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """The sums of BLOCK_F columns of one sample."""
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    sample = tl.program_id(1).to(tl.int64)
    inside = columns < width
    total = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for first in range(0, length, BLOCK_T):
        positions = first + tl.arange(0, BLOCK_T)
        rows = sample * length + positions
        counts = tl.load(tokens + rows, mask=positions < length, other=0) != 0
        block = tl.load(
            values + rows[:, None] * width + columns[None, :],
            mask=counts[:, None] & inside[None, :],
            other=0,
        ).to(tl.float32)
        if KIND == 1:
            block = tl.abs(block)
        if KIND == 2:
            factor = tl.load(factors + rows, mask=counts, other=0.0)
            block = block * block * factor[:, None]
        total += block
    tl.store(out + sample * width + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _sum_both_kernel(
    values: tl.tensor, tokens: tl.tensor, valid: tl.tensor, out: tl.tensor, length: tl.tensor,
    width: tl.tensor, each: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one sample's sums, token by token."""
    part = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    squares = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(each):
        position = part * each + step
        there = position < length
        row = sample * length + position
        counts = tl.load(tokens + row, mask=there, other=0) != 0
        exists = tl.load(valid + row, mask=there, other=0) != 0
        read = inside & (counts | exists)
        value = tl.load(values + row * width + columns, mask=read, other=0).to(tl.float32)
        square = value * value
        norm = tl.maximum(tl.sum(square, axis=0), TINY)
        squares += tl.where(counts, square / norm, 0.0)
        total += tl.where(exists, value, 0.0)
    samples = tl.num_programs(1)
    start = (part * samples + sample) * width
    tl.store(out + start + columns, squares, mask=inside)
    start += tl.num_programs(0).to(tl.int64) * samples * width
    tl.store(out + start + columns, total, mask=inside)


@triton.jit
def _weigh_marks_kernel(
    marks: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of one token's marked weights."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mark = tl.load(marks + row * width + columns, mask=columns < width, other=0) != 0
        total += tl.load(weights + row // length * width + columns, mask=mark, other=0.0)
    tl.store(out + row, tl.sum(total, axis=0))


@triton.jit
def _mark_highest_kernel(
    bits: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    marks: tl.tensor,
    width: tl.tensor,
    PPM: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BITS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Marks of one token; positive floats sort like their bits, negative ones count as 0."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own = tl.load(bits + row * width + columns, mask=inside, other=0).to(tl.int32)
    size = own & MAGNITUDE if ABSOLUTE else tl.maximum(own, 0)
    if counts is not None:
        count = tl.load(counts + row).to(tl.int32)
    if PPM > 0:
        positive = tl.sum((own > 0).to(tl.int64), axis=0)
        count = ((positive - 1) * PPM // 1000000 + 1).to(tl.int32)
    cut = tl.sum(tl.zeros([BLOCK], tl.int32), axis=0)
    for step in range(BITS):
        higher = cut | (1 << (BITS - 1 - step))
        reached = tl.sum((size >= higher).to(tl.int32), axis=0)
        cut = tl.where(reached >= count, higher, cut)
    cut = tl.maximum(cut, 1)
    tl.store(marks + row * width + columns, (size >= cut).to(tl.uint8), mask=inside)


@triton.jit
def _pick_highest_kernel(
    scores: tl.tensor, indices: tl.tensor, width: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Indices of one row's ``count`` highest scores, by a radix select of the lowest of them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    score = tl.load(scores + row * width + columns, mask=inside, other=0.0)
    score = tl.where(score == 0, 0.0, score)  # -0 counts as 0
    bits = score.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that sort like the floats
    keys = tl.where(score != score, 0x7FFFFFFF, keys)
    keys = tl.where(inside, keys, LOWEST)
    cut = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= count, 0, LOWEST)
    for step in range(31):
        higher = cut | (1 << (30 - step))
        reached = tl.sum((keys >= higher).to(tl.int32), axis=0)
        cut = tl.where(reached >= count, higher, cut)
    above = (keys > cut).to(tl.int32)
    equal = ((keys == cut) & inside).to(tl.int32)
    missing = count - tl.sum(above, axis=0)
    chosen = above | (equal & (tl.cumsum(equal, axis=0) <= missing).to(tl.int32))
    slot = tl.cumsum(chosen, axis=0) - 1
    tl.store(indices + row * count + slot, columns.to(tl.int64), mask=chosen != 0)


@triton.jit
def _count_digits_kernel(
    bits: tl.tensor,
    tokens: tl.tensor,
    neurons: tl.tensor,
    known: tl.tensor,
    found: tl.tensor,
    width: tl.tensor,
    listed: tl.tensor,
    SHIFT: tl.constexpr,
    NUMBER: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The histogram of the next digit after the known ones, over one token's neurons."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    row = sample * tl.num_programs(1) + token
    counts = (entries < listed) & (tl.load(tokens + row) != 0)
    columns = entries.to(tl.int64)
    if neurons is not None:
        columns = tl.load(neurons + sample * listed + entries, mask=counts, other=0)
    size = tl.load(bits + row * width + columns, mask=counts, other=0).to(tl.int32) & MAGNITUDE
    counts = counts & ((size >> (SHIFT + NUMBER)) == tl.load(known + sample))
    digit = (size >> SHIFT) & ((1 << NUMBER) - 1)
    tl.atomic_add(found + (sample << NUMBER) + digit, 1, mask=counts)


@triton.jit
def _narrow_kernel(
    found: tl.tensor, known: tl.tensor, missing: tl.tensor, NUMBER: tl.constexpr
) -> None:
    """Append the next digit, and reduce the rank to the values that begin with it."""
    sample = tl.program_id(0)
    digits = tl.arange(0, 1 << NUMBER)
    below = tl.cumsum(tl.load(found + (sample << NUMBER) + digits), axis=0)
    rank = tl.load(missing + sample)
    passed = below < rank
    digit = tl.sum(passed.to(tl.int32), axis=0)
    tl.store(known + sample, (tl.load(known + sample) << NUMBER) | digit)
    tl.store(missing + sample, rank - tl.max(tl.where(passed, below, 0), axis=0))
