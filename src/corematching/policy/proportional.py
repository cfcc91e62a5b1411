"""What a kept token counts for: itself, and the dropped ones that are most like it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
"""Tokens that are compared with all others at once."""


def count_alike(features: Tensor, image: Tensor, keep: Tensor, weights: Tensor | None) -> Tensor:
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

    Returns
    -------
    Tensor
        (B, T) float32; of dropped tokens what they counted for so far. The sum over kept tokens and
        text is the sum over all tokens before.
    """
    before = torch.ones_like(keep, dtype=torch.float32) if weights is None else weights.float()
    kept = image & keep
    given = before.masked_fill(~image | keep, 0)
    directions = F.normalize(features.float(), dim=-1)
    after = before.clone()
    for start in range(0, features.shape[1], CHUNK):
        rows = directions[:, start : start + CHUNK]
        likeness = rows @ directions.transpose(1, 2)  # (B, CHUNK, T)
        nearest = likeness.masked_fill(~kept[:, None], -torch.inf).argmax(2)
        after.scatter_add_(1, nearest, given[:, start : start + CHUNK])
    return after
