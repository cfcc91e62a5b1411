"""Image tokens that lie evenly over a picture.

Shapes in this file: B samples, T tokens still present.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """The image tokens of a prompt after earlier cuts.

    Attributes
    ----------
    indices : Tensor
        (B, T) long, the index of each image token still present in its picture.
    totals : Tensor
        (B,) long, the range of the indices.
    prompt_totals : Tensor
        (B,) long, image tokens of the prompt at the start.
    known_totals : tuple of int or None
        The same, where the host knows them.
    """

    indices: Tensor
    totals: Tensor
    prompt_totals: Tensor
    known_totals: tuple[int, ...] | None = None


def spread(image: Tensor, counts: Tensor, picture: Picture | None = None) -> Tensor:
    """(B, T) bool, (B,) image tokens of each sample that lie evenly over the picture."""
    if picture is None:
        return spread_evenly(image, counts)
    return spread_among(image, counts, picture.indices, picture.totals)


def spread_evenly(image: Tensor, counts: Tensor) -> Tensor:
    """The middles of ``counts[b]`` equal runs of each sample's image tokens.

    Parameters
    ----------
    image : Tensor
        (B, T) bool.
    counts : Tensor
        (B,) long, at most the number of image tokens.

    Returns
    -------
    Tensor
        (B, T) bool, ``counts[b]`` of them True in sample b.
    """
    totals = image.sum(1, keepdim=True).clamp(min=1)
    indices, counts = image.cumsum(1) - 1, counts.unsqueeze(1)
    ahead = (2 * (indices + 1) * counts + totals) // (2 * totals)
    behind = (2 * indices * counts + totals) // (2 * totals)
    return image & (ahead > behind)


def spread_among(image: Tensor, counts: Tensor, indices: Tensor, totals: Tensor) -> Tensor:
    """`spread_evenly` over a picture of which only some image tokens are left.

    The picture is cut into ``counts[b]`` equal runs; of each, the token nearest to the middle is
    taken, of two equally near ones the first. A run of which nothing is left gives none.

    Parameters
    ----------
    image : Tensor
        (B, T) bool, the image tokens left.
    counts : Tensor
        (B,) long.
    indices : Tensor
        (B, T) long, read where ``image`` is True: the index of each token in the whole picture.
    totals : Tensor
        (B,) long, image tokens of the whole picture.

    Returns
    -------
    Tensor
        (B, T) bool, at most ``counts[b]`` of them True in sample b.
    """
    totals, counts = totals.clamp(min=1).unsqueeze(1), counts.unsqueeze(1)
    length = image.shape[1]
    middle = (2 * indices + 1) * counts  # of a token; a run is 2 * totals long
    run = middle.div(2 * totals, rounding_mode="floor")
    run = torch.where(image, run, length)
    columns = torch.arange(length, device=image.device)
    distance = (middle - (2 * run + 1) * totals).abs() * length + columns
    most = torch.full_like(distance, torch.iinfo(torch.long).max)
    nearest = torch.cat([most, most[:, :1]], 1).scatter_reduce(1, run, distance, "amin")
    return image & (counts > 0) & (distance == nearest.gather(1, run))
