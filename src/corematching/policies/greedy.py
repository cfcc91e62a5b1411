"""Greedy choices of a set of tokens, in which each pick depends on those before it.

Every function takes ``among`` (B, T) bool, the tokens to choose from, and ``counts`` (B,) long, how
many to pick; it gives (B, T) long, the rank of each token in the order of picking, and ``T`` for
tokens that were not picked. A set of k tokens has the ranks below k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corematching.policies.amounts import counts_of

TINY = 1e-6


def resolve_amount(keep_ratio: float | None, keep_tokens: int | None, totals: Tensor) -> Tensor:
    """(B,) long, a ratio or a number of ``totals`` (B,) tokens, at most all; None: all."""
    if keep_tokens is not None:
        return totals.clamp(max=keep_tokens)
    return totals if keep_ratio is None else counts_of(keep_ratio, totals)


def rank_picks(order: Tensor, features: Tensor) -> Tensor:
    """(B, T) scores, falling in the order of picking, 0 where a token was not picked.

    A token with broken features, (B, T, d), gets NaN, which every budget refuses.
    """
    scores = (order.shape[1] - order).float()
    return torch.where(features.isfinite().all(-1), scores, torch.nan)


def cosine_similarity(features: Tensor) -> Tensor:
    """(B, T, d) to (B, T, T) float32; a zero vector is at 0 to all others."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def order_by_distance(distance: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """Pick so that the smallest distance among the picked ones stays as large as it can.

    First the token whose nearest neighbour is farthest away, then always the one whose nearest
    picked token is farthest away; the first among ties.

    Parameters
    ----------
    distance : Tensor
        (B, T, T), symmetric.
    """
    size = among.shape[1]
    pairs = among.unsqueeze(1) & among.unsqueeze(2)
    itself = torch.eye(size, dtype=torch.bool, device=among.device)
    others = torch.where(pairs & ~itself, distance.float(), torch.inf)
    nearest = others.amin(2)  # (B, T)
    order = torch.full_like(among, size, dtype=torch.long)
    free = among.clone()
    rows = torch.arange(len(among), device=among.device)
    for rank in range(_most(counts)):
        pick = torch.where(free, nearest, -torch.inf).argmax(1)
        going = free.any(1) & (rank < counts)
        order[rows, pick] = torch.where(going, rank, order[rows, pick])
        free[rows, pick] &= ~going
        nearest = others[rows, pick] if rank == 0 else nearest.minimum(others[rows, pick])
    return order


def order_by_volume(kernel: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """Pick so that the determinant of the picked tokens' kernel grows most at each step.

    Greedy maximum a posteriori inference of a determinantal point process, with the Cholesky
    factor extended row by row ("Fast Greedy MAP Inference for Determinantal Point Process",
    arXiv:1709.05135, algorithm 1). Once no token adds volume, the first free ones follow.

    Parameters
    ----------
    kernel : Tensor
        (B, T, T), symmetric and positive semidefinite.
    """
    kernel = kernel.float()
    size = among.shape[1]
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # (B, T), squared
    floor = TINY * torch.where(among, gain, 0).amax(1).clamp(min=TINY)
    order = torch.full_like(among, size, dtype=torch.long)
    free = among.clone()
    rows = torch.arange(len(among), device=among.device)
    steps = _most(counts)
    factor = kernel.new_zeros(len(among), steps, size)  # (B, steps, T)
    for rank in range(steps):
        left = torch.where(gain > floor.unsqueeze(1), gain, 0)
        pick = torch.where(free, left, -torch.inf).argmax(1)
        going = free.any(1) & (rank < counts)
        order[rows, pick] = torch.where(going, rank, order[rows, pick])
        free[rows, pick] &= ~going
        done = factor[:, :rank]
        known = torch.einsum("bs,bst->bt", done[rows, :, pick], done)
        row = (kernel[rows, pick] - known) / gain[rows, pick].clamp(min=TINY).sqrt().unsqueeze(1)
        row = torch.where((left[rows, pick] > 0).unsqueeze(1), row, 0)
        factor[:, rank] = row
        gain = (gain - row.square()).clamp(min=0)
    return order


def _most(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0
