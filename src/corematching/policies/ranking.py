"""Ranks the neurons of all layers of a prompt together, on a device that each launch costs time.

Shapes: L layers, B samples, F neurons, K kept ones, C parts of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from corematching import devices
from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.core import pick_top
from corematching.policies.passes import sum_tokens
from corematching.policies.together import Found, find_together
from corematching.protocol import PrefillView

PARTS = 32
"""Programs that share a layer's sums, at least."""


@dataclass
class LayerSums:
    """The sums of all layers of one prompt, side by side.

    Attributes
    ----------
    buffers : dict
        (L, 2, C, B, F) float32, by the samples, the neurons and the device.
    used : dict
        By the same, the layers that are written.
    works : bool
        Whether the score sums in parts here.
    """

    buffers: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)
    used: dict[tuple[int, int, torch.device], int] = field(default_factory=dict)
    works: bool = True

    def next(self, layers: int, activations: Tensor) -> Tensor:
        """(2, C, B, F), the place of the next layer's sums."""
        key = len(activations), activations.shape[-1], activations.device
        if key not in self.buffers:
            parts = max(1, PARTS // max(key[0], 1))
            self.buffers[key] = torch.empty(layers, 2, parts, *key[:2], device=key[2])
        place = self.used.get(key, 0)
        self.used[key] = place + 1
        return self.buffers[key][place]


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer's part in a ranking.

    Attributes
    ----------
    sums : Tensor or None
        (2, C, B, F) float32, where the score sums in parts.
    scores, total : Tensor or None
        (B, F), the scores, and the sums of the activations, where it does not.
    tokens : Tensor
        (B, T) bool, the tokens that were summed over.
    counts : np.ndarray or None
        (B,), how many these are, where the host knows.
    """

    sums: Tensor | None
    scores: Tensor | None
    total: Tensor | None
    tokens: Tensor
    counts: np.ndarray | None


def rank_later(
    view: PrefillView, score: NeuronScore, count: int, compensate: bool
) -> Callable[[], Found]:
    """The highest ``count`` neurons of a layer, found with those of all other layers.

    Parameters
    ----------
    view : PrefillView
        The layer.
    score : NeuronScore
        What neurons are ranked by.
    count : int
        K.
    compensate : bool
        Whether the means of the others are wanted.
    """
    activations, host = read_activations(view), view.host
    counts = None if host is None else np.array(host.image_counts) + np.array(host.text_counts)
    sums = view.recall(LayerSums)
    place = sums.next(view.num_layers, activations) if score.in_parts and sums.works else None
    if place is not None and score.sum_parts(view, place):
        item = LayerScores(place, None, None, view.valid, counts)
    else:
        sums.works = False
        total = sum_tokens(activations, view.valid) if compensate else None
        item = LayerScores(None, score(view), total, view.valid, counts)
    shape = len(activations), activations.shape[-1], activations.device, item.sums is None
    key = (id(score), count, compensate, *shape)
    return find_together(view, key, item, lambda items: _rank(items, score, count, compensate))


def _rank(
    items: Sequence[LayerScores], score: NeuronScore, count: int, compensate: bool
) -> list[Found]:
    """The choices of some layers, each launch for all of them."""
    layers, (batch, width) = len(items), _shape(items[0])
    if items[0].sums is not None:
        summed = _join([x.sums for x in items]).sum(2)  # (L, 2, B, F)
        scores, totals = score.finish(summed[:, 0]), summed[:, 1]
    else:
        scores = _join([x.scores for x in items])
        totals = _join([x.total for x in items]) if compensate else scores
    indices = pick_top(scores.reshape(-1, width), count).view(layers, batch, count)
    if not compensate:
        return [{"indices": found} for found in indices]
    means = (totals / _count(items, totals.device)).scatter(2, indices, 0.0)
    return [{"indices": i, "mean": m} for i, m in zip(indices, means, strict=True)]


def _count(items: Sequence[LayerScores], device: torch.device) -> Tensor:
    """(L, B, 1) long, the tokens that each layer summed over, at least 1."""
    known = [x.counts for x in items if x.counts is not None]
    if len(known) == len(items):
        return devices.upload(np.stack(known).clip(min=1)[:, :, None], device)
    sums = {id(x.tokens): x.tokens.sum(1, keepdim=True).clamp(min=1) for x in items}
    return torch.stack([sums[id(x.tokens)] for x in items])


def _join(tensors: Sequence[Tensor | None]) -> Tensor:
    """(L, ...), a view where the tensors are neighbours in one buffer."""
    given = [x for x in tensors if x is not None]
    first = given[0]
    base, step = first.untyped_storage().data_ptr(), first.numel() * first.element_size()
    for place, x in enumerate(given):
        same = x.untyped_storage().data_ptr() == base and x.is_contiguous()
        if not same or x.data_ptr() != first.data_ptr() + place * step:
            return torch.stack(given)
    return first.as_strided((len(given), *first.shape), (first.numel(), *first.stride()))


def _shape(item: LayerScores) -> tuple[int, int]:
    x = item.sums if item.sums is not None else item.scores
    assert x is not None
    return x.shape[-2], x.shape[-1]
