"""What a prefill chose, and how a later forward over the same prompt repeats it.

Shapes: B samples, T tokens of the prompt, K tokens still present.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.protocol import NeuronChoice, TokenChoice


@dataclass
class Stage:
    """One layer after which tokens were dropped.

    Attributes
    ----------
    layer : int
        The layer.
    origin : Tensor
        (B, K) long, columns in the whole prompt of the tokens that the policy chose among.
    present : Tensor
        (B, K) bool, False on filler and padding.
    choice : TokenChoice
        What it chose among them.
    """

    layer: int
    origin: Tensor
    present: Tensor
    choice: TokenChoice


@dataclass
class Selection:
    """What a prefill chose; a later forward over the same prompt can repeat it."""

    length: int
    stages: list[Stage] = field(default_factory=list)
    neurons: dict[int, NeuronChoice] = field(default_factory=dict)

    def forget_hidden(self) -> None:
        """Free the hidden states that merging policies gave; only repeating needs them."""
        for stage in self.stages:
            stage.choice.hidden = None

    def forget_neurons(self) -> None:
        """Let go of the choices of neurons; a cache that decodes with them has its own list."""
        self.neurons = {}


def find_dropped(selection: Selection, length: int) -> Tensor:
    """(B, length) bool, the prompt's columns that no stage let through."""
    first = selection.stages[0]
    gone = first.present.new_zeros(first.present.shape[0], length)
    for stage in selection.stages:
        now = gone.gather(1, stage.origin) | (stage.present & ~stage.choice.keep)
        gone = gone.scatter(1, stage.origin, now)
    return gone


def find_weights(selection: Selection, length: int) -> Tensor | None:
    """(B, length) float, what each of the prompt's columns counts for behind the last stage."""
    weights: Tensor | None = None
    for stage in selection.stages:
        now = stage.choice.weights
        if now is not None:
            weights = now.new_ones(now.shape[0], length) if weights is None else weights
            weights = weights.scatter(1, stage.origin, now)
    return weights


def extend(choice: TokenChoice, hidden: Tensor) -> TokenChoice:
    """An earlier choice, for a prompt that has grown at its end; the new tokens are all kept."""
    batch, count = choice.keep.shape
    new = hidden.shape[1] - count
    keep = torch.cat([choice.keep, choice.keep.new_ones(batch, new)], dim=1)
    merged = choice.hidden
    if merged is not None:
        merged = torch.cat([merged.to(hidden), hidden[:, count:]], dim=1)
    scores = torch.cat([choice.scores, choice.scores.new_full((batch, new), torch.nan)], dim=1)
    weights = choice.weights
    if weights is not None:
        weights = torch.cat([weights, weights.new_ones(batch, new)], dim=1)
    return TokenChoice(keep, scores, choice.cut, merged, weights)
