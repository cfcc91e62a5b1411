"""Buffers at stable addresses for captured and compiled code."""

from __future__ import annotations

import torch
from torch import Tensor


def refill(old: Tensor | None, new: Tensor) -> Tensor:
    """Copy ``new`` into ``old`` where it fits, else into a new buffer."""
    buffer = find_buffer(old, tuple(new.shape), new)
    buffer.copy_(new)
    return buffer


def find_buffer(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``old`` where it fits, else an empty tensor with a static address for compiled code."""
    kind = (like.dtype, like.device)
    if old is not None and old.shape == shape and (old.dtype, old.device) == kind:
        return old
    fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(fresh)
    return fresh


def count_sets(choices: list[Tensor]) -> int:
    """The smallest number of sets S such that groups of B / S consecutive samples choose alike."""
    batch = choices[0].shape[0]
    if batch == 1:
        return 1
    repeats = [(x[1:] == x[:-1]).reshape(batch - 1, -1).all(1) for x in choices]
    same = torch.stack(repeats).all(0).tolist()
    for sets in range(1, batch):
        group, rest = divmod(batch, sets)
        if not rest and all(same[row - 1] for row in range(1, batch) if row % group):
            return sets
    return batch
