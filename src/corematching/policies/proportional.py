"""The weight of a kept token: itself, and the dropped ones that are most like it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.policies.tokens import count_most, list_rows, take_rows

CHUNK = 1024
"""Dropped tokens that are compared with the kept ones at once."""


def count_alike(
    features: Tensor,
    image: Tensor,
    keep: Tensor,
    weights: Tensor | None,
    most: tuple[int, int] | None = None,
) -> Tensor:
    """Count every dropped image token to the kept one that it is most like.

    Attention to a kept token then counts for those that are gone (proportional attention: Token
    Merging, arXiv:2210.09461, section 3), so that text and background weigh what they weighed
    before. Tokens are compared by the cosine of their features.

    Parameters
    ----------
    features : Tensor
        (B, T, d), what the layer passes on.
    image, keep : Tensor
        (B, T) bool, image tokens, and those of them that are kept.
    weights : Tensor or None
        (B, T), what each token counts for so far; None: 1.
    most : tuple of int or None
        The most kept and the most dropped image tokens of a sample; None: this waits for the
        device.

    Returns
    -------
    Tensor
        (B, T) float32; of dropped tokens their weight so far. The sum over kept tokens and
        text is the sum over all tokens before.
    """
    before = torch.ones_like(keep, dtype=torch.float32) if weights is None else weights.float()
    stays, goes = image & keep, image & ~keep
    most = (count_most(stays), count_most(goes)) if most is None else most
    (columns, kept), (rows, gone) = list_rows(stays, most[0]), list_rows(goes, most[1])
    targets = F.normalize(_take_floats(features, columns), dim=-1).transpose(1, 2)
    given = before.gather(1, rows).masked_fill(~gone, 0)
    after = before.clone()
    for start in range(0, rows.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        # the cosines with the kept ones, times a length that changes no comparison among them
        likeness = _take_floats(features, rows[:, part]) @ targets  # (B, CHUNK, kept ones)
        nearest = likeness.masked_fill(~kept[:, None], -torch.inf).argmax(2)
        after.scatter_add_(1, columns.gather(1, nearest), given[:, part])
    return after


def _take_floats(features: Tensor, indices: Tensor) -> Tensor:
    """(B, K, d) float32, the features (B, T, d) at these indices (B, K)."""
    return take_rows(features, indices).float()
