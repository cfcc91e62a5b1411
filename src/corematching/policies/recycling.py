"""SparseVLM's token recycling: some of the dropped tokens live on in a few merged ones."""

from __future__ import annotations

import torch
from torch import Tensor


def recycle_dropped(
    hidden: Tensor, scores: Tensor, dropped: Tensor, ratio: float = 0.3, per_cluster: int = 10
) -> tuple[Tensor, Tensor]:
    """Merge the best of the dropped tokens into cluster centres.

    Of n dropped tokens the ``m = floor(ratio * n) + 1`` with the highest scores are clustered into
    ``floor(m / per_cluster) + 1`` clusters, and each centre becomes its cluster's mean (SparseVLM,
    arXiv:2410.04417, with the counts of its released code, which puts the merged tokens behind the
    image; here each stays at its centre's index).

    Parameters
    ----------
    hidden : Tensor
        (B, T, d).
    scores : Tensor
        (B, T), read where ``dropped`` is True.
    dropped : Tensor
        (B, T) bool.

    Returns
    -------
    tuple of Tensor
        (B, T) bool, the centres; (B, T, d), the hidden states with the centres' replaced.
    """
    centres, merged = torch.zeros_like(dropped), hidden.clone()
    for sample in range(len(dropped)):
        pool = dropped[sample].nonzero().squeeze(1)
        if not len(pool):
            continue
        order = scores[sample, pool].argsort(descending=True, stable=True)
        pool = pool[order[: int(len(pool) * ratio) + 1]]
        features = hidden[sample, pool].float()
        heads, members = cluster_by_density(features, len(pool) // per_cluster + 1)
        means = torch.zeros_like(features[heads]).index_add_(0, members, features)
        means /= members.bincount(minlength=len(heads)).unsqueeze(1)
        centres[sample, pool[heads]] = True
        merged[sample, pool[heads]] = means.to(merged.dtype)
    return centres, merged


def cluster_by_density(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peak clustering over the k nearest neighbours, with k the number of clusters.

    A token's density is ``exp(-mean d^2)`` over its k nearest tokens, itself included, with d the
    Euclidean distance over sqrt(width). The centres are the tokens with the highest density times
    distance to the nearest denser token; of equally dense tokens the first counts as denser.

    Parameters
    ----------
    features : Tensor
        (N, d) float.
    count : int
        Clusters, in [1, N].

    Returns
    -------
    tuple of Tensor
        (count,) long, the centres; (N,) long, each token's cluster.
    """
    distance = torch.cdist(features, features) / features.shape[1] ** 0.5
    nearest = distance.topk(count, dim=1, largest=False).values
    density = (-nearest.square().mean(1)).exp()
    index = torch.arange(len(features), device=features.device)
    denser = density.unsqueeze(0) > density.unsqueeze(1)
    denser |= (density.unsqueeze(0) == density.unsqueeze(1)) & (index < index.unsqueeze(1))
    separation = torch.where(denser, distance, distance.max()).amin(1)
    heads = (separation * density).argsort(descending=True, stable=True)[:count]
    members = distance[:, heads].argmin(1)
    members[heads] = torch.arange(count, device=features.device)
    return heads, members
