"""Passes over the activations of a whole prompt, (B, T, F), that touch the memory once.

The activations are far larger than a processor's caches, and a policy runs while the prompt waits.
On the CPU sums go block by block, so that a block's float32 copy stays in the cache. Other devices
take the prompt in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.statistics import mark_highest, sum_rows, weigh_marks

BLOCK_BYTES = 1 << 20
"""A block's size in float32."""


def read_blocks(values: Tensor, tokens: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Some tokens of one sample at a time, as float32 that may be written on until the next block.

    Parameters
    ----------
    values : Tensor
        (B, T, F), of any dtype.
    tokens : Tensor
        (B, T) bool; the values of the others read as 0.

    Yields
    ------
    (int, slice, Tensor)
        The sample, its tokens, and (t, F) float32.
    """
    batch, length, width = values.shape
    on_cpu = devices.on_host(values)
    step = max(1, min(length, BLOCK_BYTES // (4 * max(width, 1)))) if on_cpu else max(length, 1)
    buffer = torch.empty(step, width, dtype=torch.float32, device=values.device)
    whole = on_cpu and bool(tokens.all())
    for sample in range(batch):
        for first in range(0, length, step):
            part = slice(first, min(first + step, length))
            block = buffer[: part.stop - first].copy_(values[sample, part])
            if not whole:
                block.masked_fill_(~tokens[sample, part].unsqueeze(-1), 0)
            yield sample, part, block


def sum_tokens(values: Tensor, tokens: Tensor, absolute: bool = False) -> Tensor:
    """The sum of values (B, T, F), or of their magnitudes, over the tokens (B, T) that count.

    Returns
    -------
    Tensor
        (B, F) float32; counts of a mask are exact up to 2**24.
    """
    found = sum_rows(values, tokens, "sizes" if absolute else "values")
    if found is not None:
        return found
    shape = len(values), values.shape[-1]
    total = torch.zeros(shape, dtype=torch.float32, device=values.device)
    for sample, _, block in read_blocks(values, tokens):
        if absolute:
            block.abs_()
        total[sample] += block.new_ones(len(block)) @ block
    return total


def dot_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """The product of each token's values (B, T, F) with its sample's weights (B, F): (B, T)."""
    found = weigh_marks(values, weights)
    if found is not None:
        return found
    every = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    products = torch.empty(values.shape[:2], dtype=torch.float32, device=values.device)
    for sample, part, block in read_blocks(values, every):
        products[sample, part] = block @ weights[sample]
    return products


def count_positive(values: Tensor) -> Tensor:
    """(B, T, 1) long, the positive entries of each token."""
    return (values > 0).sum(-1, keepdim=True)


def mark_largest(values: Tensor, counts: Tensor | int, most: int, absolute: bool) -> Tensor:
    """Mark the entries that are above 0 and not below the token's ``counts``-th largest one.

    Parameters
    ----------
    values : Tensor
        (B, T, F), in any float dtype.
    counts : Tensor or int
        (B, T, 1) long, or one number for all tokens; less than 1 counts as 1, more than
        ``most`` as ``most``.
    most : int
        A bound that is known without waiting for the device.
    absolute : bool
        Go by the magnitudes.

    Returns
    -------
    Tensor
        (B, T, F) bool.
    """
    width = values.shape[-1]
    most = min(max(most, 1), width)
    counts = min(max(counts, 1), most) if isinstance(counts, int) else counts.clamp(1, most)
    found = mark_highest(values.detach(), counts, absolute)
    if found is not None:
        return found
    if isinstance(counts, int):
        counts = torch.full((*values.shape[:-1], 1), counts, device=values.device)
    ranked = values.abs() if absolute else values
    largest = ranked.topk(most, dim=-1).values
    cuts = largest.gather(-1, counts.expand(*values.shape[:-1], 1) - 1)
    return (ranked >= cuts) & (ranked > 0)
