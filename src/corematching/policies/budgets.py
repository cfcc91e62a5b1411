"""The number of image tokens kept: scores and image mask in, keep mask out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching import devices
from corematching.errors import ConfigError
from corematching.policies.amounts import count_of, counts_of
from corematching.policies.broken import report_broken
from corematching.policies.check import (
    check_bool,
    check_number,
    check_tokens_count,
    check_tokens_ratio,
    normalize_amount,
)
from corematching.policies.component import Component
from corematching.policies.spread import Picture, spread

ADVICE = "check the score's formula, and the model's dtype for overflow"


@dataclass(frozen=True, kw_only=True)
class Budget(Component, kind="budget"):
    """Base class: override `count`. The highest scores are kept, the first among ties.

    A sample with image tokens keeps at least one. With ``cover``, that ratio of
    the kept tokens lies evenly over the image tokens, whatever their scores, and the highest scores
    fill the rest: a view of the whole picture, such as "where is it?" needs.
    """

    min_ratio: float | None = field(
        default=None, metadata={"help": "keep at least this ratio of the image tokens"}
    )
    min_tokens: int | None = field(
        default=None, metadata={"help": "keep at least this number of image tokens"}
    )
    max_ratio: float | None = field(
        default=None, metadata={"help": "keep at most this ratio of the image tokens"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "keep at most this number of image tokens"}
    )
    cover: float = field(
        default=0.0, metadata={"help": "ratio of the kept tokens spread evenly, in [0, 1)"}
    )

    def __post_init__(self) -> None:
        check_number("cover", self.cover, least=0)
        if self.cover >= 1:
            raise ConfigError(f"cover={self.cover}: give a ratio in [0, 1)")
        normalize_amount(self, prefix="min")
        normalize_amount(self, prefix="max")
        for unit in ("ratio", "tokens"):
            least, most = (getattr(self, f"{end}_{unit}") for end in ("min", "max"))
            if least is not None and most is not None and least > most:
                raise ConfigError(f"min_{unit}={least} is above max_{unit}={most}: swap them")

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        """The number of image tokens that each sample keeps, before `bound`.

        Parameters
        ----------
        curve : Tensor
            (B, T) float32, each sample's image token scores in falling order, then -inf.
        totals : Tensor
            (B,) long, image tokens of each sample, those already dropped included; 0 is possible.
        """
        raise NotImplementedError

    def known_count(self, total: int) -> int | None:
        """`count` for one sample, where it needs no scores.

        Parameters
        ----------
        total : int
            Image tokens of the sample, at least 1.

        Returns
        -------
        int or None
            The number of tokens to keep; None where scores decide it.
        """
        return None

    def __call__(self, scores: Tensor, image: Tensor, picture: Picture | None = None) -> Tensor:
        """Choose the image tokens to keep.

        Parameters
        ----------
        scores : Tensor
            (B, T) float; read where ``image`` is True.
        image : Tensor
            (B, T) bool.
        picture : Picture, optional
            The whole picture, if ``image`` has only some of its tokens. It determines the number
            to keep, and ``cover`` spreads over it.

        Returns
        -------
        Tensor
            (B, T) bool, a subset of ``image``.

        Raises
        ------
        ConfigError
            When every sample has an image token whose score is NaN or infinite. Where only some
            have, a warning names them, and all scores of theirs count as equal. A GPU is not waited
            for: there `TokenChoice.check` says so.
        """
        broken = find_broken(scores, image)
        if devices.on_host(scores):
            report_broken("token scores", broken, image.any(1), ADVICE)
        scores = scores.float().masked_fill(broken.unsqueeze(1), 0.0)
        filled = torch.where(image, scores, -torch.inf)
        order = filled.argsort(dim=1, descending=True, stable=True)
        present = image.sum(1)
        totals = present if picture is None else picture.prompt_totals
        counts = self.bound(self.count(filled.gather(1, order), totals), totals).minimum(present)
        if self.cover:
            even = spread(image, (counts * self.cover).round().long(), picture)
            order = filled.masked_fill(even, torch.inf).argsort(dim=1, descending=True, stable=True)
        return image & (_invert(order) < counts.unsqueeze(1))

    def bound(self, counts: Tensor, totals: Tensor) -> Tensor:
        """Keep counts within the least and the most that the parameters allow.

        Parameters
        ----------
        counts : Tensor
            (B,) long, image tokens to keep.
        totals : Tensor
            (B,) long, image tokens of each sample.

        Returns
        -------
        Tensor
            (B,) long, at least 1 and at most ``totals``; 0 without image tokens.
        """
        if self.min_ratio is not None:
            counts = counts.maximum(counts_of(self.min_ratio, totals))
        if self.min_tokens is not None:
            counts = counts.clamp(min=self.min_tokens)
        if self.max_ratio is not None:
            counts = counts.minimum(counts_of(self.max_ratio, totals))
        if self.max_tokens is not None:
            counts = counts.clamp(max=self.max_tokens)
        return counts.clamp(min=1).minimum(totals)

    def bound_known(self, count: int, total: int) -> int:
        """`bound` for one sample.

        Parameters
        ----------
        count, total : int
            Image tokens to keep, and of the sample.

        Returns
        -------
        int
            At least 1 and at most ``total``.
        """
        if self.min_ratio is not None:
            count = max(count, count_of(self.min_ratio, max(total, 1)))
        count = max(count, self.min_tokens or 1)
        if self.max_ratio is not None:
            count = min(count, count_of(self.max_ratio, max(total, 1)))
        return min(max(min(count, self.max_tokens or count), 1), total)


@dataclass(frozen=True)
class Knee(Budget, name="knee"):
    """Cut at the maximum geometric distance (CoreMatching, arXiv:2505.19235).

    The chord joins the first and the last point of the sorted scores; the cut is at the point
    ``argmax_i | y_i - (y_0 + i / (N - 1) * (y_{N-1} - y_0)) |``, the first one if several tie. (The
    vertical distance is the geometric one times a constant.) ``strict``, as in the authors' code,
    keeps the tokens above that point's score; otherwise those at it stay too, and they also
    stay where nothing lies above it. A straight or flat curve has no knee: all are kept.
    """

    strict: bool = field(
        default=True, metadata={"help": "drop the token at the knee itself, keep those above it"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("strict", self.strict)

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        distance = measure_chord_distance(curve, totals)
        farthest, knee = distance.max(1)
        score = curve.gather(1, knee.unsqueeze(1))
        above = (curve > score).sum(1)
        with_ties = (curve >= score).sum(1)
        counts = torch.where(above > 0, above, with_ties) if self.strict else with_ties
        return torch.where(farthest > 0, counts, totals)


@dataclass(frozen=True)
class Ratio(Budget, name="ratio"):
    """Keep a ratio of the image tokens still present, rounded half up."""

    keep_ratio: float = field(
        default=0.2, metadata={"help": "ratio of image tokens kept, in (0, 1]"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = check_tokens_ratio("keep_ratio", "Count: keep_tokens", self.keep_ratio)
        object.__setattr__(self, "keep_ratio", ratio)

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        return counts_of(self.keep_ratio, totals)

    def known_count(self, total: int) -> int | None:
        return count_of(self.keep_ratio, total)


@dataclass(frozen=True)
class Count(Budget, name="count"):
    """Keep the same number of image tokens in every sample; all if there are fewer."""

    keep_tokens: int = field(default=64, metadata={"help": "number of image tokens kept"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens_count("Ratio: keep_ratio", "keep_tokens", self.keep_tokens)

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        return torch.full_like(totals, self.keep_tokens)

    def known_count(self, total: int) -> int | None:
        return self.keep_tokens


def find_broken(scores: Tensor, image: Tensor) -> Tensor:
    """(B,) bool, the samples with an image token whose score is NaN or infinite."""
    return (~scores.isfinite() & image).any(1)


def budget_of(keep_ratio: float | None, keep_tokens: int | None, **bounds: Any) -> Ratio | Count:
    """`Ratio` or `Count`, for whichever of a method's two parameters is given."""
    if keep_tokens is not None:
        return Count(keep_tokens, **bounds)
    assert keep_ratio is not None
    return Ratio(keep_ratio, **bounds)


def measure_chord_distance(curve: Tensor, totals: Tensor) -> Tensor:
    """Each point's vertical distance from the chord of its sample's sorted scores.

    Distances within float32's rounding of the scores count as 0, so do points past the curve's end.

    Parameters
    ----------
    curve : Tensor
        (B, T) float32, falling; -inf past the first ``totals[b]`` entries.
    totals : Tensor
        (B,) long.

    Returns
    -------
    Tensor
        (B, T) float32.
    """
    steps = torch.arange(curve.shape[1], device=curve.device)
    inside = steps < totals.unsqueeze(1)
    curve = torch.where(inside, curve, 0.0)
    first = curve[:, :1]
    last = curve.gather(1, (totals - 1).clamp(min=0).unsqueeze(1))
    slope = (last - first) / (totals - 1).clamp(min=1).unsqueeze(1)
    distance = (curve - (first + steps * slope)).abs()
    rounding = 1e-6 * curve.abs().amax(1, keepdim=True)
    return torch.where(inside & (distance > rounding), distance, 0.0)


def _invert(order: Tensor) -> Tensor:
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)
