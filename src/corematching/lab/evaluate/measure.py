"""The quality of answers: accuracy with its interval, and distance from the dense model.

Shapes: N questions, B samples of a batch, V words of the vocabulary, K of them singled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
SIZE = 1024
"""Number of likeliest words kept of a first token's distribution."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


class Bootstrap:
    """Resamples whole pictures, since the questions about one picture are not independent.

    Parameters
    ----------
    pictures : sequence of str
        (N,) the picture of each question.
    seed : int
        Same seed, same interval.
    """

    def __init__(self, pictures: Sequence[str], seed: int, resamples: int = RESAMPLES) -> None:
        names, self.groups = np.unique(np.asarray(pictures), return_inverse=True)
        count = len(names)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples)

    def mean(self, values: Sequence[float]) -> Interval:
        """The mean over the questions."""
        x = np.asarray(values, dtype=float)
        return self._interval(x, np.ones_like(x))

    def ratio(self, values: Sequence[float], others: Sequence[float]) -> Interval | None:
        """The mean over another one of the same questions; None where that is 0."""
        y = np.asarray(others, dtype=float)
        return self._interval(np.asarray(values, dtype=float), y) if y.any() else None

    def _interval(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> Interval:
        sums = self.weights @ np.bincount(self.groups, x)
        wholes = self.weights @ np.bincount(self.groups, y)
        drawn = sums[wholes > 0] / wholes[wholes > 0]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Interval(float(x.sum() / y.sum()), float(low), float(high))


def condense(logits: Tensor, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """The likeliest words of each sample's distribution.

    Parameters
    ----------
    logits : Tensor
        (B, V).
    size : int
        K, at most V.

    Returns
    -------
    (Tensor, Tensor)
        (B, K) long words and (B, K) float32 log-probabilities.
    """
    chosen = logits.double().log_softmax(-1).topk(min(size, logits.shape[-1]), dim=-1)
    return chosen.indices, chosen.values.float()


def kl_from(words: Tensor, log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of a distribution from a condensed one, ``sum_w p(w) log(p(w) / q(w))``.

    All words that are not singled out count as one, so this is a lower bound, and exact where all
    are.

    Parameters
    ----------
    words, log_probs : Tensor
        (B, K), p as `condense` gave it.
    logits : Tensor
        (B, V), q.

    Returns
    -------
    Tensor
        (B,) float64, in nats.
    """
    q = logits.double().log_softmax(-1).gather(-1, words)
    p = log_probs.double()
    told = (p.exp() * (p - q)).sum(-1)
    rest_p, rest_q = (1 - x.exp().sum(-1) for x in (p, q))
    rest_p, rest_q = rest_p.clamp(min=0), rest_q.clamp(min=1e-12)
    if words.shape[-1] == logits.shape[-1]:
        return told.clamp(min=0)
    other = torch.where(rest_p > 0, rest_p * (rest_p / rest_q).log(), 0.0)
    return (told + other).clamp(min=0)
