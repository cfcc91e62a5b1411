"""Policies composed to an installable method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corematching import devices
from corematching.errors import ConfigError
from corematching.methods.base import BaseMethod
from corematching.policies.amounts import layers_of
from corematching.policies.base import NeuronScore, TokenScore, read_activations
from corematching.policies.broken import report_later
from corematching.policies.budgets import ADVICE, Budget, find_broken
from corematching.policies.check import check_bool, check_depth
from corematching.policies.compensation import average_dropped
from corematching.policies.component import REGISTRY, Component
from corematching.policies.core import pick_top
from corematching.policies.known_cut import cut_known
from corematching.policies.passes import sum_tokens
from corematching.policies.proportional import count_alike
from corematching.policies.ranking import rank_later
from corematching.policies.schedules import Schedule
from corematching.policies.spread import Picture
from corematching.protocol import (
    ACTIVATIONS,
    EMBEDDINGS,
    KEPT,
    NeuronChoice,
    NeuronPolicy,
    PrefillView,
    TokenChoice,
    TokenPolicy,
)


class TokenDropper(Component, TokenPolicy, kind="token policy"):
    """Base class of token policies that have a name and parameters."""


class NeuronDropper(Component, NeuronPolicy, kind="neuron policy"):
    """Base class of neuron policies that have a name and parameters."""


@dataclass(frozen=True)
class TokenRule(TokenDropper, name="token-rule"):
    """Score the image tokens after a layer, keep what the budget allows; text is always kept."""

    score: TokenScore = field(metadata={"help": "token score", "kind": "token score"})
    budget: Budget = field(metadata={"help": "how many to keep", "kind": "budget"})
    after: tuple[int | float, ...] = field(
        default=(6 / 32,),
        metadata={
            "help": "drop after these layers: ints (layer indices, -1 is the input), or floats "
            "(ratio of the depth that still sees every token)"
        },
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        check_bool("proportional", self.proportional)
        check_type("score", self.score, TokenScore)
        check_type("budget", self.budget, Budget)
        after = self.after if isinstance(self.after, tuple | list) else (self.after,)
        object.__setattr__(self, "after", tuple(after))
        if not self.after:
            raise ConfigError("after is empty: name at least one layer, such as after=(6 / 32,)")
        for layer in self.after:
            check_depth("after", layer, least=-1)

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the score reads."""
        return self.score.needs

    def drop_after(self, num_layers: int) -> tuple[int, ...]:
        """The layers after which tokens are dropped, ascending.

        Raises
        ------
        ConfigError
            The model is too shallow, or the score reads a layer in front of layer 0.
        """
        layers = sorted({_layer_index(layer, num_layers) for layer in self.after})
        if layers[-1] > num_layers - 2:
            raise ConfigError(
                f"tokens dropped after layer {layers[-1]} save nothing in a model of {num_layers} "
                f"decoder layers: give layers up to {num_layers - 2}"
            )
        if layers[0] == -1 and self.needs - {EMBEDDINGS}:
            raise ConfigError(
                f"'{self.score.name}' reads what a decoder layer computes: drop after layer 0 or a "
                "later one"
            )
        return tuple(layers)

    def choose(self, view: PrefillView, picture: Picture | None = None) -> TokenChoice:
        """Choose among the image tokens still present.

        Parameters
        ----------
        view : PrefillView
            The layer that has just run.
        picture : Picture, optional
            The whole picture, of which the view has only some tokens; see `Budget`.
        """
        scores = self.score(view)
        known = cut_known(self.budget, scores, view, picture)
        if known is not None:
            return known.choose(view, scores, self.proportional)
        kept = self.budget(scores, view.image, picture)
        dropped = torch.where(view.image & ~kept, scores, -torch.inf).amax(1, keepdim=True)
        cut = torch.where(kept & (scores >= dropped), scores, torch.inf).amin(1)
        cut = torch.where(cut.isfinite(), cut, torch.nan)
        choice = TokenChoice(keep=kept | view.text, scores=scores, cut=cut)
        most: tuple[int, int] | None = None
        if not devices.on_host(scores):
            most = self._read_counts(view, kept, choice)
        if self.proportional:
            assert view.hidden is not None
            choice.weights = count_alike(view.hidden, view.image, kept, view.weights, most)
        return choice

    def _read_counts(
        self, view: PrefillView, kept: Tensor, choice: TokenChoice
    ) -> tuple[int, int] | None:
        """Wait for a GPU once: the most kept and the most dropped tokens of a sample."""
        report = report_later("token scores", find_broken(choice.scores, view.image), ADVICE)
        image = view.image
        choice.check = lambda: report(image.any(1))
        if view.host is None:
            return None
        choice.counts = tuple(kept.sum(1).tolist())
        counts = zip(view.host.image_counts, choice.counts, strict=True)
        return max(choice.counts), max(total - count for total, count in counts)


@dataclass(frozen=True)
class NeuronRule(NeuronDropper, name="neuron-rule"):
    """Score the intermediate neurons over the prompt, keep each layer's highest for the decode."""

    score: NeuronScore = field(metadata={"help": "neuron score", "kind": "neuron score"})
    schedule: Schedule = field(metadata={"help": "ratio per layer", "kind": "neuron schedule"})
    compensate: bool = field(
        default=False,
        metadata={"help": "stand in for dropped neurons with their mean over the prompt"},
    )

    def __post_init__(self) -> None:
        check_type("score", self.score, NeuronScore)
        check_type("schedule", self.schedule, Schedule)
        check_bool("compensate", self.compensate)

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that the choice reads."""
        kept = {KEPT} if getattr(self.score, "token_set", None) == "kept" else set()
        mean = {ACTIVATIONS} if self.compensate else set()
        return self.score.needs | kept | mean

    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """Neurons to keep in each layer; ``width`` leaves the layer dense."""
        return self.schedule.counts(num_layers, width)

    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose ``count`` neurons of the view's layer for each sample.

        Scores, and sums over the tokens, are taken now; the ranking waits for the first token.
        """
        if not devices.on_host(view.valid):
            return NeuronChoice(later=rank_later(view, self.score, count, self.compensate))
        scores, tokens = self.score(view), view.valid
        total = sum_tokens(read_activations(view), tokens) if self.compensate else None

        def rank() -> dict[str, Tensor | None]:
            indices = pick_top(scores, count)
            mean = None if total is None else average_dropped(total, tokens, indices)
            return {"indices": indices, "mean": mean}

        return NeuronChoice(later=rank)


@dataclass(frozen=True)
class Sparsifier(BaseMethod, name="sparsifier"):
    """Any token policy with any neuron policy; either may be None.

    Examples
    --------
    >>> Sparsifier(tokens=TokenRule(TextOverlap(), Ratio(0.2)))  # doctest: +SKIP
    """

    tokens: TokenPolicy | None = field(
        default=None, metadata={"help": "token policy", "kind": "token policy"}
    )
    neurons: NeuronPolicy | None = field(
        default=None, metadata={"help": "neuron policy", "kind": "neuron policy"}
    )

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_type("tokens", self.tokens, TokenPolicy)
        if self.neurons is not None:
            check_type("neurons", self.neurons, NeuronPolicy)


def _layer_index(layer: int | float, num_layers: int) -> int:
    """The layer index of an int (itself) or of a ratio of the depth that sees every token."""
    if isinstance(layer, float):
        return min(max(1, layers_of(layer, num_layers)), max(1, num_layers - 1)) - 1
    return layer


def check_type(name: str, value: Any, expected: type) -> None:
    """Refuse what is of another type; a method in a score's place gets the score's name."""
    if isinstance(value, expected):
        return
    scores = REGISTRY.get(getattr(expected, "kind", ""), {})
    known = scores.get(value.name) if isinstance(value, BaseMethod) else None
    hint = f", such as {known.__name__}()" if known else ""
    if expected in (TokenPolicy, NeuronPolicy):
        hint = f", of a class that subclasses {expected.__module__}.{expected.__name__}"
    raise ConfigError(f"{name}={value!r}: give a {expected.__name__}{hint}")
