"""What one layer shows, on views made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corematching import CoreMatching, GriffinScore, Ratio, TopNeurons
from corematching.errors import ConfigError
from corematching.lab.analyze import Rule, default_rules
from corematching.lab.analyze.layer import count_neurons, examine_layer, measure_influence
from tests.policies.views import make_view

A = [
    [1.0, 2.0, -1.0, 0.0],  # image: activates 0 and 1
    [3.0, -1.0, 0.0, 0.0],  # image: activates 0
    [-1.0, -1.0, 4.0, -1.0],  # image: activates 2
    [2.0, 0.0, 0.0, -3.0],  # text: activates 0
]
TERMS = [[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [2.0, 0.0]]  # their sum is (4, 2)


def make_layer(**parts):
    """Three image tokens and a text token, two heads."""
    rows = torch.tensor([[[[0.5, 0.1, 0.2, 0.2]], [[0.3, 0.3, 0.2, 0.2]]]])  # (1, H, 1, T)
    return make_view(
        ["iiit"],
        [A],
        attention=lambda asked: rows if asked.tolist() == [[3]] else None,
        contributions=lambda: torch.tensor([TERMS]),
        **parts,
    )


def test_influence_is_attention_cosine_and_product():
    found = measure_influence(make_layer())
    length = np.sqrt(20)
    assert found["attention"] == pytest.approx([0.4, 0.2, 0.2])
    assert found["cosine"] == pytest.approx([4 / length, 2 / length, -4 / length])
    assert found["product"] == pytest.approx([1.6 / length, 0.4 / length, -0.8 / length])


def test_neurons_are_counted():
    """Top of the positives at rho = 0.1: {1}, {0}, {2}, {0}; beta = 0.5 keeps neurons 0 and 1."""
    neurons = count_neurons(make_layer(), rho=0.1, beta=0.5)
    assert (neurons.width, neurons.core, neurons.ever) == (4, 2, 3)
    assert neurons.activated == {"image": pytest.approx(4 / 3), "text": 1.0}
    assert neurons.inside == {"image": pytest.approx(2 / 3), "text": 1.0}
    assert neurons.shared == 1.0  # {0, 1} of the picture (ties: the first) and {0, 1} of the text


def test_a_layer_is_examined_under_each_rule():
    paper = Rule.of("paper", "Paper", CoreMatching.paper(top_ratio=0.1, neuron_ratio=0.5))
    found = examine_layer(make_layer(), [paper])
    scored = found.rules["paper"]
    assert scored.scores.tolist() == [2, 1, 0]
    assert scored.kept.tolist() == [True, True, True] and scored.ratio == 1  # no knee
    assert scored.budgeted == 3
    assert scored.correlations["cosine"] == pytest.approx(1)
    assert scored.correlations["attention"] == pytest.approx(np.sqrt(3) / 2)  # ranks 3, 1.5, 1.5
    told = found.to_dict()
    assert told["layer"] == 4 and told["neurons"]["core"] == 2  # 40 % of 4
    assert told["rules"]["paper"]["above_knee"] == 3


def test_default_rules_are_the_methods():
    paper, ours = default_rules()
    assert paper.method == CoreMatching.paper()
    assert paper.token_score.name == "core-overlap" and paper.neuron_ratio == 0.4
    default = CoreMatching()
    assert ours.token_score == default.tokens.score and ours.neuron_score == GriffinScore()
    assert ours.neuron_ratio < 1 and ours.budget == Ratio(default.keep_ratio)
    assert ours.to_dict()["method"] == ours.method.to_dict()


def test_neurons_are_ranked_over_all_tokens():
    neurons = TopNeurons(score=GriffinScore(token_set="kept"))
    rule = Rule.of("x", "X", CoreMatching(neurons=neurons))
    assert rule.neuron_score.parameters()["token_set"] == "all"


@pytest.mark.parametrize("nothing", ["score", "neurons"])
def test_a_method_that_keeps_everything_is_no_rule(nothing):
    with pytest.raises(ConfigError, match="both tokens and neurons"):
        Rule.of("x", "X", CoreMatching(**{"neurons": TopNeurons(), nothing: None}))
    with pytest.raises(ConfigError, match="such as CoreMatching"):
        Rule.of("x", "X", CoreMatching())
