"""Token policies that drop in stages, each with a budget of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from corematching.errors import ConfigError
from corematching.methods.sparsifier import TokenDropper, TokenRule
from corematching.policies.base import TokenScore
from corematching.policies.budgets import Budget, Count, Ratio, budget_of
from corematching.policies.spread import Picture
from corematching.protocol import PrefillView, TokenChoice


@dataclass
class WholePicture:
    """The image tokens of one prompt at the start, as its first stage saw them.

    Attributes
    ----------
    indices : Tensor or None
        (B, T) long, the index of each image token among its sample's.
    totals : Tensor or None
        (B,) long, image tokens of each sample.
    known : tuple of int or None
        The same, where the host knows them.
    """

    indices: Tensor | None = None
    totals: Tensor | None = None
    known: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StagedRule(TokenDropper, name="staged-rule"):
    """Score the image tokens after several layers and keep less each time; text is always kept.

    Budgets are of the image tokens that the prompt had at the start, and what a stage spreads
    evenly lies evenly over the whole picture, not over what the stages before left of it. Of stages
    that fall on one layer of a shallow model, the last one counts.
    """

    score: TokenScore = field(metadata={"help": "token score", "kind": "token score"})
    budgets: tuple[Ratio | Count, ...] = field(
        default=(Ratio(0.5), Ratio(0.25), Ratio(0.125)),
        metadata={"help": "how many each stage keeps: Ratio or Count", "kind": "budget"},
    )
    after: tuple[int | float, ...] = field(
        default=(0.25, 0.5, 0.75),
        metadata={"help": "the stages' layers, as in token-rule; one for each budget"},
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        for name in ("budgets", "after"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_stages(self.budgets, self.after)
        for layer in self.after:
            self._rule(layer)

    @property
    def budget(self) -> Budget:
        """The budget of the last stage."""
        return self.budgets[-1]

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

    def stages(self, num_layers: int) -> dict[int, Ratio | Count]:
        """The budget of each layer that drops.

        Parameters
        ----------
        num_layers : int
            Decoder layers of the model.
        """
        layers = (self._rule(layer).drop_after(num_layers)[0] for layer in self.after)
        return dict(zip(layers, self.budgets, strict=True))

    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the image tokens still present.

        Raises
        ------
        ConfigError
            The view is of a layer after which nothing is dropped.
        """
        stages = self.stages(view.num_layers)
        if view.layer not in stages:
            raise ConfigError(f"no stage after layer {view.layer}: the stages are {list(stages)}")
        return self._rule(view.layer, stages[view.layer]).choose(view, find_picture(view))

    def _rule(self, layer: int | float, budget: Budget | None = None) -> TokenRule:
        budget = Ratio(1.0) if budget is None else budget
        return TokenRule(self.score, budget, (layer,), self.proportional)


def find_picture(view: PrefillView) -> Picture:
    """The picture of each sample; a view without `origin` has that of the tokens still present."""
    here, present = view.image.cumsum(1) - 1, view.image.sum(1)
    whole = view.recall(WholePicture)
    if whole.indices is None or whole.totals is None:
        whole.indices, whole.totals = here, present
        whole.known = None if view.host is None else view.host.image_counts
    totals = whole.totals.to(here.device)
    if view.origin is None:
        return Picture(here, present, totals, whole.known)
    indices = whole.indices.to(here.device).gather(1, view.origin)
    return Picture(indices, totals, totals, whole.known)


def check_stages(budgets: Sequence[Any], layers: Sequence[Any]) -> None:
    """Refuse budgets that are not one `Ratio` or `Count` for each layer, or that rise."""
    if len(budgets) != len(layers):
        raise ConfigError(
            f"{len(budgets)} amount{_s(budgets)} to keep for {len(layers)} layer{_s(layers)}: "
            "give one for each"
        )
    for budget in budgets:
        if not isinstance(budget, Ratio | Count):
            raise ConfigError(f"budgets={budget!r}: a stage keeps a Ratio or a Count")
    for earlier, later in pairwise(budgets):
        for name in ("keep_ratio", "keep_tokens"):
            before, after = (getattr(budget, name, 0) for budget in (earlier, later))
            if type(earlier) is type(later) and after > before:
                raise ConfigError(
                    f"{name}: {after} are more than the {before} that the layer before leaves, "
                    "give falling amounts"
                )


def _s(items: Sequence[Any]) -> str:
    return "" if len(items) == 1 else "s"


def make_stages(
    keep_ratio: float | tuple[float, ...] | None,
    keep_tokens: int | tuple[int, ...] | None,
    shape: Sequence[float],
    **bounds: Any,
) -> tuple[Ratio | Count, ...]:
    """Budgets of all stages.

    Parameters
    ----------
    keep_ratio, keep_tokens : float, int or tuple
        One of them is given. Several amounts stay as they are. A single one is what the last stage
        keeps; the earlier ones keep more, in the proportions of ``shape``.
    shape : sequence of float
        The published ratios.
    **bounds
        Of every budget.
    """
    if isinstance(keep_ratio, tuple):
        return tuple(Ratio(ratio, **bounds) for ratio in keep_ratio)
    if isinstance(keep_tokens, tuple):
        return tuple(Count(tokens, **bounds) for tokens in keep_tokens)
    factors = [stage / shape[-1] for stage in shape]
    if keep_tokens is not None:
        return tuple(Count(round(keep_tokens * factor), **bounds) for factor in factors)
    assert keep_ratio is not None
    return tuple(Ratio(min(1.0, keep_ratio * factor), **bounds) for factor in factors)


def make_rule(
    score: TokenScore,
    layers: tuple[int | float, ...],
    keep_ratio: float | tuple[float, ...] | None,
    keep_tokens: int | tuple[int, ...] | None,
    taper: float,
    proportional: bool,
    cover: float = 0.0,
) -> TokenRule | StagedRule:
    """One cut, or a `StagedRule` where there are several layers or an amount for each.

    Parameters
    ----------
    taper : float
        The ratio that each layer leaves of what the one before left.
    """
    if len(layers) > 1 or isinstance(keep_ratio, tuple) or isinstance(keep_tokens, tuple):
        shape = [taper**stage for stage in range(len(layers))]
        budgets = make_stages(keep_ratio, keep_tokens, shape, cover=cover)
        return StagedRule(score, budgets, layers, proportional)
    budget = budget_of(keep_ratio, keep_tokens, cover=cover)
    return TokenRule(score, budget, layers, proportional)
