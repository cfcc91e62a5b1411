"""Token policies that drop in stages, each with an amount of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from corematching.errors import ConfigError
from corematching.methods.sparsifier import TokenDropper, TokenRule
from corematching.policy.base import TokenScore
from corematching.policy.budgets import Budget, Count, Ratio, spread_among
from corematching.policy.check import check_amount
from corematching.policy.greedy import resolve_amount
from corematching.protocol import PrefillView, TokenChoice

PLACES = "staged-rule.places"


@dataclass(frozen=True)
class StagedRule(TokenDropper, name="staged-rule"):
    """Score the image tokens after several layers and keep less each time; text is always kept.

    Amounts are of the image tokens that the prompt had at the start, and what a stage spreads
    evenly lies evenly over the whole picture, not over what the stages before left of it. Of stages
    that fall on one layer of a shallow model, the last one counts.
    """

    score: TokenScore = field(metadata={"help": "token score", "kind": "token score"})
    keep: tuple[int | float, ...] = field(
        default=(0.5, 0.25, 0.125),
        metadata={"help": "image tokens kept by each stage: shares (float) or counts (int)"},
    )
    after: tuple[int | float, ...] = field(
        default=(0.25, 0.5, 0.75),
        metadata={"help": "the stages' layers, as in token-rule; one for each amount"},
    )
    cover: float = field(
        default=0.0,
        metadata={"help": "share of each stage's tokens spread evenly over the picture, in [0, 1)"},
    )
    floor: int | float | None = field(
        default=None, metadata={"help": "keep at least this share (float) or count (int) of them"}
    )
    ceiling: int | float | None = field(
        default=None, metadata={"help": "keep at most this share (float) or count (int) of them"}
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        for name in ("keep", "after"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.keep) != len(self.after):
            amounts, layers = len(self.keep), len(self.after)
            raise ConfigError(
                f"{amounts} amount{_s(amounts)} to keep for {layers} layer{_s(layers)}: "
                "give one for each"
            )
        for amount in self.keep:
            check_amount("keep", amount)
        for earlier, later in pairwise(self.keep):
            if type(earlier) is type(later) and later > earlier:
                raise ConfigError(
                    f"keep={self.keep}: {later} are more than the {earlier} that the layer before "
                    "leaves, give falling amounts"
                )
        self._limit(Ratio, 1.0)
        for layer in self.after:
            self._rule(layer)

    @property
    def budget(self) -> Budget:
        """What is kept after the last stage, as one cut would keep it."""
        last = self.keep[-1]
        return self._limit(Ratio if isinstance(last, float) else Count, last)

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the score reads."""
        return self.score.needs

    @property
    def weighs(self) -> bool:
        """Whether choices carry weights."""
        return self.proportional

    def drop_after(self, num_layers: int) -> tuple[int, ...]:
        """The layers after which tokens are dropped, ascending.

        Raises
        ------
        ConfigError
            When the model is too shallow, or the stages do not follow each other.
        """
        layers = tuple(self.stages(num_layers))
        if list(layers) != sorted(layers):
            raise ConfigError(f"stages after layers {layers}: name them from the first to the last")
        return layers

    def stages(self, num_layers: int) -> dict[int, int | float]:
        """The amount that each layer keeps."""
        places = (self._rule(layer).drop_after(num_layers)[0] for layer in self.after)
        return dict(zip(places, self.keep, strict=True))

    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the image tokens still present."""
        stages = self.stages(view.num_layers)
        if view.layer not in stages:
            raise ConfigError(f"no stage after layer {view.layer}: the stages are {list(stages)}")
        places, totals, present = _number_images(view)
        counts = resolve_amount(stages[view.layer], totals)
        if self.floor is not None:
            counts = counts.maximum(resolve_amount(self.floor, totals))
        if self.ceiling is not None:
            counts = counts.minimum(resolve_amount(self.ceiling, totals))
        budget = _Stage(counts, places, present, cover=self.cover)
        return self._rule(view.layer, budget).choose(view)

    def _limit(self, kind: Any, amount: int | float) -> Budget:
        budget: Budget = kind(amount, cover=self.cover, floor=self.floor, ceiling=self.ceiling)
        return budget

    def _rule(self, layer: int | float, budget: Budget | None = None) -> TokenRule:
        budget = Ratio(1.0) if budget is None else budget
        return TokenRule(self.score, budget, (layer,), self.proportional)


@dataclass(frozen=True, eq=False)
class _Stage(Budget):
    """How many tokens each sample keeps, (B,) long, and where they stand in the whole picture."""

    counts: Tensor
    places: Tensor
    totals: Tensor

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        return self.counts

    def spread(self, image: Tensor, counts: Tensor) -> Tensor:
        return spread_among(image, counts, self.places, self.totals)


def _number_images(view: PrefillView) -> tuple[Tensor, Tensor, Tensor]:
    """Where the image tokens stand in their picture, and how many there are.

    Returns
    -------
    (Tensor, Tensor, Tensor)
        (B, T) long, each image token's place among those of the whole picture; (B,) long, how many
        the prompt had at the start; (B,) long, how many the places count. A view that does not say
        where its tokens stood counts those still present.
    """
    here, present = view.image.cumsum(1) - 1, view.image.sum(1)
    whole, totals = (x.to(here.device) for x in view.memory.setdefault(PLACES, (here, present)))
    if view.origin is None:
        return here, totals, present
    return whole.gather(1, view.origin), totals, totals


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def scale_stages(
    keep: Sequence[int | float] | int | float, shape: Sequence[float]
) -> tuple[int | float, ...]:
    """Amounts for all stages from one for the last.

    Parameters
    ----------
    keep : sequence, int or float
        Several amounts stay as they are. One is what the last stage keeps, a share (float) or a
        count (int); the earlier ones keep more, in the proportions of ``shape``.
    shape : sequence of float
        The published amounts.
    """
    if isinstance(keep, Sequence):
        return tuple(keep)
    check_amount("keep", keep)
    factors = [stage / shape[-1] for stage in shape]
    if isinstance(keep, float):
        return tuple(min(1.0, keep * factor) for factor in factors)
    return tuple(round(keep * factor) for factor in factors)
