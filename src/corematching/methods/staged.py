"""Token policies that drop in stages, each with an amount of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from corematching.errors import ConfigError
from corematching.methods.sparsifier import TokenDropper, TokenRule
from corematching.policy.base import TokenScore
from corematching.policy.budgets import Budget, Ratio
from corematching.policy.check import check_amount
from corematching.policy.greedy import resolve_amount
from corematching.protocol import PrefillView, TokenChoice

TOTALS = "staged-rule.totals"


@dataclass(frozen=True)
class StagedRule(TokenDropper, name="staged-rule"):
    """Score the image tokens after several layers and keep less each time; text is always kept.

    Amounts are of the image tokens that the prompt had at the start. Of stages that fall on one
    layer of a shallow model, the last one counts.
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

    def __post_init__(self) -> None:
        for name in ("keep", "after"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.keep) != len(self.after):
            raise ConfigError(
                f"{len(self.keep)} amounts to keep for {len(self.after)} layers: give one for each"
            )
        for amount in self.keep:
            check_amount("keep", amount)
        for layer in self.after:
            self._rule(layer)

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the score reads."""
        return self.score.needs

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
        totals = view.memory.setdefault(TOTALS, view.image.sum(1))
        counts = resolve_amount(stages[view.layer], totals)
        return self._rule(view.layer, _Counts(counts)).choose(view)

    def _rule(self, layer: int | float, budget: Budget | None = None) -> TokenRule:
        return TokenRule(self.score, budget or Ratio(1.0), (layer,))


@dataclass(frozen=True, eq=False)
class _Counts(Budget):
    """How many tokens each sample keeps, (B,) long, known beforehand."""

    counts: Tensor

    def count(self, curve: Tensor, totals: Tensor) -> Tensor:
        return self.counts


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
