"""Cuts whose number of tokens is known before a GPU has scored any.

A `Ratio` or a `Count` of image tokens that the host has counted needs no answer from the device:
the choice is one kernel, and the prompt goes on behind it.

Shapes: B samples, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.selection import Kept, credit_nearest, keep_highest
from corematching.policies.broken import report_later
from corematching.policies.budgets import ADVICE, Budget, Count, Ratio
from corematching.policies.proportional import CHUNK, count_alike
from corematching.policies.spread import Picture, spread
from corematching.policies.tokens import take_rows, upload
from corematching.protocol import PrefillView, TokenChoice


@dataclass(frozen=True, eq=False)
class KnownCut:
    """What a budget keeps of a view.

    Attributes
    ----------
    found : Kept
        The kernel's choice.
    counts, present : tuple of int
        Image tokens that each sample keeps, and those that it has.
    """

    found: Kept
    counts: tuple[int, ...]
    present: tuple[int, ...]

    def choose(self, view: PrefillView, scores: Tensor, weighed: bool) -> TokenChoice:
        """The choice, with weights if they are wanted; NaN and infinite scores are refused later.

        Parameters
        ----------
        view : PrefillView
            The layer that was cut.
        scores : Tensor
            (B, T) float32.
        weighed : bool
            Whether kept tokens count for the dropped ones most like them.
        """
        found = self.found
        report = report_later("token scores", found.broken, ADVICE)
        weights = self._weigh(view) if weighed else None
        return TokenChoice(
            found.keep,
            scores,
            found.cut,
            None,
            weights,
            self.counts,
            lambda: report(torch.tensor(self.present) > 0),
        )

    def _weigh(self, view: PrefillView) -> Tensor:
        """(B, T) float32, see `count_alike`."""
        hidden, found = view.hidden, self.found
        assert hidden is not None
        if view.weights is None:
            after = torch.ones_like(view.image, dtype=torch.float32)
        else:
            after = view.weights.to(torch.float32, copy=True)
        features = take_rows(hidden, found.listed).float()
        targets, rows = features[:, : found.most], features[:, found.most :]
        norms = torch.linalg.vector_norm(targets, dim=-1)
        for first in range(0, rows.shape[1], CHUNK):
            products = rows[:, first : first + CHUNK] @ targets.transpose(1, 2)
            if not credit_nearest(products, norms, found, after, first):
                return count_alike(hidden, view.image, found.kept, view.weights)
        return after


def cut_known(
    budget: Budget, scores: Tensor, view: PrefillView, picture: Picture | None = None
) -> KnownCut | None:
    """Keep what a budget says by one kernel; None where its number depends on the scores.

    Parameters
    ----------
    budget : Budget
        What decides how many image tokens are kept.
    scores : Tensor
        (B, T) float32.
    view : PrefillView
        The layer that is cut.
    picture : Picture, optional
        The whole picture; see `Budget`.
    """
    host, known = view.host, type(budget) in (Ratio, Count)
    if host is None or not known or devices.on_host(scores) or not max(host.image_counts):
        return None
    totals = host.image_counts if picture is None else picture.known_totals
    if totals is None:
        return None
    present = host.image_counts
    wanted = [budget.bound_known(budget.known_count(n) or 0, n) if n else 0 for n in totals]
    counts = tuple(min(n, m) for n, m in zip(wanted, present, strict=True))
    even, cover = None, budget.cover
    if cover and picture is not None:
        numbers = np.round(np.array(counts, dtype=np.float32) * np.float32(cover))
        even = spread(view.image, upload(view, numbers.astype(np.int64)), picture)
    found = keep_highest(scores, view.image, view.valid, counts, present, cover, even)
    return None if found is None else KnownCut(found, counts, present)
