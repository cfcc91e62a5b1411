"""Choices made from part of the tokens or of the neurons."""

from __future__ import annotations

import torch

from corematching import CoreMatching, Magnitude, Norm, TopNeurons
from corematching.analyze import Rule
from corematching.analyze.recovery import (
    choose_neurons,
    choose_tokens,
    draw,
    recover,
    see_neurons,
    see_tokens,
)
from tests.policy.views import make_view

A = [
    [9.0, 0.0, 0.0, 1.0],  # image 0
    [8.0, 0.0, 1.0, 0.0],  # image 1
    [0.0, 2.0, 0.0, 1.0],  # image 2
    [0.0, 2.0, 0.0, 1.0],  # image 3
    [0.0, 0.0, 3.0, 0.0],  # text
]
METHOD = CoreMatching(
    score=Norm(),
    neurons=TopNeurons(0.5, score=Magnitude(top_ratio=0.25)),
    keep_tokens=2,
    cover=0.5,
)
RULE = Rule.of("norm", "Norm", METHOD)
VIEW = make_view(["iiiit"], [A])


def test_neurons_over_the_tokens_that_are_seen():
    """Each token votes for its largest: all, 0 0 1 1 2 gives {0, 1}; images 0 and 1 give {0, 2}."""
    assert choose_neurons(VIEW, RULE).tolist() == [0, 1]
    seen = see_tokens(VIEW, torch.tensor([0, 1]))
    assert seen.valid.shape == (1, 3) and seen.image.tolist() == [[True, True, False]]
    assert choose_neurons(seen, RULE).tolist() == [0, 2]


def test_tokens_from_the_neurons_that_are_seen():
    assert choose_tokens(VIEW, RULE, 2).tolist() == [0, 1]
    assert choose_tokens(see_neurons(VIEW, torch.tensor([1, 3])), RULE, 2).tolist() == [2, 3]


def test_weights_stay_with_whole_activations_only():
    view = make_view(["iiiit"], [A], down_proj=torch.arange(8.0).view(2, 4))
    assert see_tokens(view, torch.tensor([3])).down_proj is view.down_proj
    assert see_neurons(view, torch.tensor([0, 2])).down_proj is None


def test_recovery_of_a_whole_layer():
    """Core tokens 0 and 1 lead to neurons {0, 2} of {0, 1}; neurons {0, 1} lead back to them."""
    found = recover(VIEW, RULE, Norm()(VIEW), torch.Generator().manual_seed(0))
    assert found.tokens_kept == 0.5
    assert found.neurons_from_core == 0.5
    assert found.tokens_from_core == 1.0
    assert found.neurons_from_random in (0.5, 1.0)
    assert found.tokens_from_random in (0.0, 0.5, 1.0)


def test_everything_leads_to_everything():
    rule = Rule.of(
        "all", "All", CoreMatching(score=Norm(), keep_ratio=1.0, neurons=TopNeurons(1.0))
    )
    found = recover(VIEW, rule, Norm()(VIEW), torch.Generator().manual_seed(0))
    assert set(vars(found).values()) == {1.0}


def test_draws_hang_on_the_generator_only():
    values = torch.tensor([3, 5, 7, 9, 11])
    drawn = [draw(values, 3, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) > 1
    for each in drawn:
        assert each == sorted(set(each)) and set(each) <= set(values.tolist()) and len(each) == 3
