"""The upper bound: image tokens chosen by the objects' known boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.errors import ConfigError
from corematching.lab.evaluate.task import Area
from corematching.methods import BaseMethod, GateThreshold, TokenRule, TopNeurons
from corematching.policies.base import TokenScore
from corematching.policies.budgets import Budget, budget_of
from corematching.policies.check import check_ratio, normalize_amount
from corematching.protocol import PrefillView

LEAST_COVER = 0.25


@dataclass(frozen=True)
class BoxCoverage(TokenScore, name="boxes"):
    """Patches that the boxes of the scene cover first, innermost of every box first.

    A covered patch scores in (0, 1], 1 minus its rank within its box over the patches of the box,
    so that a budget takes the same ratio of every object; a patch of the background scores minus
    its distance to the nearest box, in picture widths. A box covers the patches of which it fills a
    quarter, and the one of which it fills most. The image tokens must be one square grid over the
    whole picture. `show` names the scenes of the next batch.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    scenes: list[Sequence[Area]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def show(self, scenes: Sequence[Sequence[Area]]) -> None:
        """Name the boxes of each sample of the next batch, in fractions of the picture."""
        self.scenes[:] = scenes

    def score(self, view: PrefillView) -> Tensor:
        if len(self.scenes) != len(view.image):
            raise ConfigError(
                f"the oracle knows {len(self.scenes)} scenes, the batch has {len(view.image)}: run "
                "it with `corematching eval`, which shows it each batch's scenes"
            )
        scores = torch.zeros(view.image.shape)
        for row, (image, areas) in enumerate(zip(view.image.cpu(), self.scenes, strict=True)):
            scores[row, image] = rank_patches(areas, side_of(int(image.sum())))
        return scores.to(view.image.device)


@dataclass(frozen=True, kw_only=True)
class Covered(Budget, name="covered"):
    """Every token whose score is above 0."""

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        return (curve > 0).sum(1)


def side_of(tokens: int) -> int:
    """Patches along one side of the grid.

    Raises
    ------
    ConfigError
        The tokens form no square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(
            f"the oracle cannot place boxes on {tokens} image tokens, which form no square: use a "
            "model that turns the whole picture into one square grid, such as SceneVLM"
        )
    return side


def rank_patches(areas: Sequence[Area], side: int) -> Tensor:
    """(side * side,) scores of the patches, row by row; see `BoxCoverage`."""
    edges = torch.arange(side) / side
    middles = edges + 0.5 / side
    scores = torch.full((side, side), -2.0)
    for left, top, right, bottom in areas:
        across = _overlap(edges, 1 / side, left, right)
        down = _overlap(edges, 1 / side, top, bottom)
        cover = down[:, None] * across[None, :] * side * side  # (side, side), ratio of each patch
        x = middles - (left + right) / 2
        y = middles - (top + bottom) / 2
        beside = ((middles - middles.clamp(left, right)) ** 2)[None, :]
        below = ((middles - middles.clamp(top, bottom)) ** 2)[:, None]
        scores = scores.maximum(-(beside + below).sqrt())
        covered = cover >= min(LEAST_COVER, float(cover.max()))
        found = (covered & (cover > 0)).flatten().nonzero()[:, 0]
        order = (y[:, None] ** 2 + x[None, :] ** 2).flatten()[found].argsort(stable=True)
        inside = torch.full((side * side,), -2.0)
        inside[found[order]] = 1 - torch.arange(len(found)) / max(1, len(found))
        scores = scores.maximum(inside.view(side, side))
    return scores.flatten()


def _overlap(edges: Tensor, width: float, start: float, stop: float) -> Tensor:
    """The length of each cell ``[edge, edge + width]`` that lies in ``[start, stop]``."""
    return ((edges + width).clamp(max=stop) - edges.clamp(min=start)).clamp(min=0)


@dataclass(frozen=True)
class Oracle(BaseMethod, name="oracle"):
    """The patches under the objects; ``neuron_ratio`` below 1 adds our rules for neurons."""

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "ratio of the image tokens kept; default: all that the boxes cover"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    layer: int | float = field(
        default=0.3, metadata={"help": "image tokens go after this layer, as in CoreMatching"}
    )
    neuron_ratio: float = field(
        default=1.0,
        metadata={"help": "ratio of the neurons in reach of our gate's rule; 1: all neurons"},
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int | float):
            raise ConfigError(f"layer={self.layer!r}: the oracle drops tokens once, give one layer")
        normalize_amount(self)
        check_ratio("neuron_ratio", self.neuron_ratio)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        covered = self.keep_ratio is None and self.keep_tokens is None
        budget = Covered() if covered else budget_of(self.keep_ratio, self.keep_tokens)
        return TokenRule(BoxCoverage(), budget, (self.layer,), self.proportional)

    def make_neurons(self) -> GateThreshold | None:
        if self.neuron_ratio == 1:
            return None
        return GateThreshold(among=TopNeurons(self.neuron_ratio))
