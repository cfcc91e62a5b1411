"""VisionZip and LLaVA-PruMerge: choose and merge image tokens by the vision tower's own attention.

Both look at one layer of a vision tower: the attention from its class token to the patches, and the
patches' keys. Shapes: I images, N patches of each, S = N plus the class token, H heads, D width
of a head, d width of the features, which are the tower's (what the projector gets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.policies.tokens import take_rows


def zip_tokens(
    features: Tensor, attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """VisionZip: the tokens that get most attention, and a few merged from the rest.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467. The
    dominant tokens have the highest attention from the class token, summed over heads. Of
    the n others, in the picture's order, ``contextual`` ones at a stride of ``n // contextual`` are
    targets; each remaining one goes to the target with the most similar key (cosine of the keys
    averaged over heads), and a target gets the mean of those that came to it added, as in the
    released code. The class token, which that code keeps as one token more, is not among
    the image tokens and is left out.

    Parameters
    ----------
    features : Tensor
        (I, N, d).
    attention : Tensor
        (I, H, N), from the class token to the patches.
    keys : Tensor
        (I, H, N, D).
    dominant, contextual : int
        Tokens to keep, and tokens to merge the others into.

    Returns
    -------
    tuple of Tensor
        (I, N) bool, dominant and contextual tokens; (I, N, d), the features with the contextual
        ones replaced.

    Raises
    ------
    ConfigError
        When there are fewer tokens than asked for.
    """
    images, total = features.shape[:2]
    if dominant < 1 or contextual < 0 or dominant + contextual > total:
        raise ConfigError(
            f"dominant={dominant} and contextual={contextual} of {total} image tokens: give at "
            "least one dominant token, and no more than there are in all"
        )
    order = attention.float().sum(1).argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(images, total, dtype=torch.bool, device=features.device)
    keep.scatter_(1, order[:, :dominant], True)
    if contextual == 0:
        return keep, features
    rest = keep.long().argsort(dim=1, stable=True)[:, : total - dominant]  # (I, n), ascending
    stride = max(1, rest.shape[1] // contextual)
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
    is_target[: contextual * stride : stride] = True
    targets, others = rest[:, is_target], rest[:, ~is_target]
    metric = torch.nn.functional.normalize(keys.float().mean(1), dim=-1)  # (I, N, D)
    similarity = take_rows(metric, others) @ take_rows(metric, targets).transpose(1, 2)
    chosen = torch.nn.functional.one_hot(similarity.argmax(2), contextual).float()  # (I, o, c)
    sums = chosen.transpose(1, 2) @ take_rows(features.float(), others)
    means = sums / chosen.sum(1).clamp(min=1).unsqueeze(-1)
    merged = take_rows(features, targets) + means.to(features.dtype)
    index = targets.unsqueeze(-1).expand_as(merged)
    return keep.scatter(1, targets, True), features.scatter(1, index, merged)


def prune_and_merge(
    features: Tensor, attention: Tensor, keys: Tensor, counts: Tensor, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """PruMerge: the tokens with most of the class token's attention, with their neighbours added.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arXiv:2403.15388. The top tokens by attention are kept, as many as `count_outliers` finds; then
    ``x_i += sum_j a_j x_j`` over the tokens j with the most similar keys (cosine), kept ones
    included. The one token more that the released code makes of all dropped ones is left out: it
    is not among the image tokens.

    Parameters
    ----------
    features : Tensor
        (I, N, d).
    attention : Tensor
        (I, N), from `attend_to_patches` over the whole width.
    keys : Tensor
        (I, N, H * D).
    counts : Tensor
        (I,) long, tokens to keep, in [1, N].
    neighbours : int
        Tokens added to each kept one.

    Returns
    -------
    tuple of Tensor
        (I, N) bool, the kept tokens; (I, N, d), the features with those of kept tokens replaced.
    """
    total = features.shape[1]
    order = attention.float().argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(total, device=order.device).expand_as(order)
    keep = torch.empty_like(order).scatter_(1, order, ranks) < counts.unsqueeze(1)
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    itself = torch.eye(total, dtype=torch.bool, device=keys.device)
    similarity = (unit @ unit.transpose(1, 2)).masked_fill(itself, -torch.inf)
    nearest = similarity.topk(min(neighbours, total - 1), dim=2).indices
    near = torch.zeros_like(similarity).scatter_(2, nearest, 1.0)
    weights = near * attention.float().unsqueeze(1)
    merged = features.float() + weights @ features.float()
    return keep, torch.where(keep.unsqueeze(-1), merged.to(features.dtype), features)


def attend_to_patches(queries: Tensor, keys: Tensor, scaling: float, classes: int) -> Tensor:
    """The attention to each patch from the class token, or else from the average patch.

    VisionZip reads every head; PruMerge one softmax over the whole width, `join_heads` before this.

    Parameters
    ----------
    queries, keys : Tensor
        (I, H, S, D), the class token first.
    scaling : float
        What the products are multiplied with, such as ``D ** -0.5``.
    classes : int
        Class tokens; with 0 the mean over the patches' own rows stands for the class token's.

    Returns
    -------
    Tensor
        (I, H, N) float32.
    """
    rows = queries[:, :, :classes] if classes else queries
    scores = rows.float() @ keys.float().transpose(2, 3) * scaling
    return scores.softmax(-1).mean(2)[:, :, classes:]


def join_heads(heads: Tensor) -> Tensor:
    """(I, H, S, D) to (I, 1, S, H * D), one head as wide as all."""
    return heads.transpose(1, 2).flatten(2).unsqueeze(1)


def count_outliers(attention: Tensor) -> Tensor:
    """PruMerge's number of tokens: entries above ``Q3 + 1.5 (Q3 - Q1)``, at least one.

    The paper keeps ``int(N r)`` of N tokens, r being the ratio of such entries.

    Parameters
    ----------
    attention : Tensor
        (I, N).

    Returns
    -------
    Tensor
        (I,) long, each image by itself.
    """
    attention = attention.float()
    low, high = attention.quantile(attention.new_tensor([0.25, 0.75]), dim=1)
    return (attention > (high + 1.5 * (high - low)).unsqueeze(1)).sum(1).clamp(min=1)
