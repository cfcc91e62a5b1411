"""TokenRule and NeuronRule: a score and a budget or a schedule, put together."""

import math

import pytest
import torch

from corematching import (
    Count,
    DenseEnds,
    GriffinScore,
    Knee,
    Magnitude,
    NeuronRule,
    Norm,
    PaperScore,
    RandomTokens,
    Ratio,
    TokenRule,
    Uniform,
)
from corematching.errors import ConfigError
from corematching.protocol import ACTIVATIONS, NeuronPolicy, TokenPolicy
from tests.policies.views import make_view


def norms(*sizes):
    """Activations whose norms are the given ones."""
    return [[[float(size), 0.0] for size in sizes]]


def test_rules_are_policies():
    assert isinstance(TokenRule(Norm(), Ratio(0.5)), TokenPolicy)
    assert isinstance(NeuronRule(GriffinScore(), Uniform(0.5)), NeuronPolicy)


def test_token_rule_keeps_text_and_the_best_image_tokens():
    view = make_view([".tiiit"], norms(9, 1, 5, 7, 6, 1))
    choice = TokenRule(Norm(), Count(2)).choose(view)
    assert choice.keep.tolist() == [[False, True, False, True, True, True]]
    assert choice.cut.tolist() == [6]
    assert choice.scores[0, 2:5].tolist() == [5, 7, 6]
    assert choice.scores.isnan().sum() == 3 and choice.hidden is None


def test_token_rule_without_image_keeps_all_but_padding():
    view = make_view([".ttt", "tiit"], torch.randn(2, 4, 8))
    choice = TokenRule(Norm(), Ratio(0.5)).choose(view)
    assert choice.keep[0].tolist() == [False, True, True, True]
    assert math.isnan(choice.cut[0]) and choice.cut[1].isfinite()
    assert choice.keep[1].sum() == 3


def test_cut_is_the_lowest_kept_score():
    view = make_view(["iiiii"], norms(6, 100, 0, 10, 8))
    choice = TokenRule(Norm(), Knee(strict=False)).choose(view)
    assert choice.keep.tolist() == [[False, True, False, True, False]]
    assert choice.cut.tolist() == [10]


@pytest.mark.parametrize(
    ("after", "depth", "expected"),
    [
        ((6 / 32,), 32, (5,)),
        ((6 / 32,), 30, (5,)),
        ((0.25, 0.5, 0.75), 32, (7, 15, 23)),
        ((2, 6, 2), 12, (2, 6)),
        ((0.01,), 12, (0,)),
        ((0.99,), 12, (10,)),
        ((0.25, 0.3), 4, (0,)),
        (5, 12, (5,)),
    ],
)
def test_layers(after, depth, expected):
    assert TokenRule(Norm(), Ratio(0.5), after).drop_after(depth) == expected


def test_layers_beyond_the_model_are_refused():
    with pytest.raises(ConfigError, match="give layers up to 10"):
        TokenRule(Norm(), Ratio(0.5), (11,)).drop_after(12)
    with pytest.raises(ConfigError):
        TokenRule(Norm(), Ratio(0.5), (0.5,)).drop_after(1)


def test_input_of_the_first_layer_only_for_scores_that_read_no_layer():
    assert TokenRule(RandomTokens(), Ratio(0.5), (-1, 3)).drop_after(12) == (-1, 3)
    with pytest.raises(ConfigError, match="'norm' reads what a decoder layer computes"):
        TokenRule(Norm(), Ratio(0.5), (-1,)).drop_after(12)


def test_neuron_rule_by_hand():
    a = [[[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0], [6.0, 0.0, 8.0, 0.0]]]
    view = make_view(["tit"], a)
    bare = NeuronRule(GriffinScore(), Uniform(0.5, multiple=1)).choose(view, 2)
    assert bare.indices is None  # the ranking waits for the first token
    bare.materialize()
    assert bare.indices.tolist() == [[0, 2]] and bare.mean is None
    with_mean = (
        NeuronRule(GriffinScore(), Uniform(0.5), compensate=True).choose(view, 2).materialize()
    )
    assert with_mean.mean is not None
    torch.testing.assert_close(with_mean.mean, torch.tensor([[0.0, -4 / 3, 0.0, 0.0]]))


def test_neuron_rule_counts():
    rule = NeuronRule(PaperScore(), DenseEnds(0.5, first=1, last=1))
    assert rule.counts(4, 96) == (96, 48, 48, 96)
    assert rule.needs == {ACTIVATIONS}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenRule("norm", Ratio(0.5)),
        lambda: TokenRule(Norm(), 0.5),
        lambda: TokenRule(Norm(), Ratio(0.5), ()),
        lambda: TokenRule(Norm(), Ratio(0.5), (-2,)),
        lambda: TokenRule(Norm(), Ratio(0.5), (1.0,)),
        lambda: NeuronRule(Norm(), Uniform(0.5)),
        lambda: NeuronRule(Magnitude(), 0.5),
        lambda: NeuronRule(Magnitude(), Uniform(0.5), compensate="yes"),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()
