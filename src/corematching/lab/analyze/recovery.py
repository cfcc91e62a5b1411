"""Recovery of core neurons from core tokens, and of core tokens from core neurons."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corematching.lab.analyze.rank import measure_recovery
from corematching.lab.analyze.rules import Rule
from corematching.policies.amounts import count_of
from corematching.policies.core import pick_top
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Recovery:
    """One layer of one prompt under one rule; every figure is a ratio in [0, 1].

    Attributes
    ----------
    tokens_kept : float
        Core tokens, of the image tokens.
    neurons_from_core, neurons_from_random : float
        Of the core neurons of all tokens, those found again when the rule sees the text with the
        core tokens only, or with as many random image tokens.
    tokens_from_core, tokens_from_random : float
        Of the core tokens, those found again when the rule sees the core neurons only, or as many
        random neurons.
    """

    tokens_kept: float
    neurons_from_core: float
    neurons_from_random: float
    tokens_from_core: float
    tokens_from_random: float


def recover(view: PrefillView, rule: Rule, scores: Tensor, generator: torch.Generator) -> Recovery:
    """Choose tokens from few neurons and neurons from few tokens, and compare with the full choice.

    Parameters
    ----------
    view : PrefillView
        A layer of a batch of one, with activations.
    rule : Rule
    scores : Tensor
        (1, T), the rule's token scores from all neurons; NaN where the token is no image token.
    generator : torch.Generator
        Draws the random tokens and neurons, one set of each.
    """
    assert view.activations is not None
    width, indices = view.activations.shape[-1], view.image[0].nonzero()[:, 0]
    kept = rule.budget(scores, view.image)[0]  # (T,)
    core_tokens = kept.nonzero()[:, 0]
    core_neurons = choose_neurons(view, rule)
    some_tokens = draw(indices, len(core_tokens), generator)
    some_neurons = draw(torch.arange(width), len(core_neurons), generator)
    tokens, neurons = core_tokens.tolist(), core_neurons.tolist()

    def find_neurons(seen: Tensor) -> float:
        return measure_recovery(choose_neurons(see_tokens(view, seen), rule).tolist(), neurons)

    def find_tokens(seen: Tensor) -> float:
        found = choose_tokens(see_neurons(view, seen), rule, len(tokens))
        return measure_recovery(found.tolist(), tokens)

    return Recovery(
        tokens_kept=len(tokens) / len(indices),
        neurons_from_core=find_neurons(core_tokens),
        neurons_from_random=find_neurons(some_tokens),
        tokens_from_core=find_tokens(core_neurons),
        tokens_from_random=find_tokens(some_neurons),
    )


def choose_neurons(view: PrefillView, rule: Rule) -> Tensor:
    """(K,) the rule's core neurons over the tokens of the view, a ratio ``neuron_ratio`` of all."""
    scores = rule.neuron_score(view)
    return pick_top(scores, count_of(rule.neuron_ratio, scores.shape[-1]))[0]


def choose_tokens(view: PrefillView, rule: Rule, count: int) -> Tensor:
    """(count,) indices of the image tokens that score highest on the neurons of the view."""
    scores = rule.token_score(view)
    return pick_top(torch.where(view.image, scores, -torch.inf), count)[0]


def see_tokens(view: PrefillView, chosen: Tensor) -> PrefillView:
    """The view of a batch of one without any image token but the chosen ones.

    Parameters
    ----------
    chosen : Tensor
        (K,) long, indices of image tokens.
    """
    assert view.activations is not None
    stays = view.text[0].index_fill(0, chosen.to(view.valid.device), True)
    indices = stays.nonzero()[:, 0]
    return PrefillView(
        layer=view.layer,
        num_layers=view.num_layers,
        valid=view.valid[:, indices],
        image=view.image[:, indices],
        activations=view.activations[:, indices],
        down_proj=view.down_proj,
    )


def see_neurons(view: PrefillView, chosen: Tensor) -> PrefillView:
    """The view without any neuron but the chosen ones, for token scores; it shows no weights.

    Parameters
    ----------
    chosen : Tensor
        (K,) long.
    """
    assert view.activations is not None
    return replace(view, activations=view.activations[..., chosen], down_proj=None)


def draw(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count,) of the values without replacement, ascending; the generator is on the CPU."""
    order = torch.randperm(len(values), generator=generator)[:count].sort().values
    return values[order.to(values.device)]
