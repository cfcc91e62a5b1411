"""The base classes of policies: defaults, and the refusal of a class that is no policy."""

from dataclasses import dataclass, field

import pytest
import torch

from corematching.errors import ConfigError
from corematching.protocol import (
    ACTIVATIONS,
    NeuronChoice,
    NeuronPolicy,
    PrefillView,
    TokenChoice,
    TokenPolicy,
)
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import TestMethod, generate


class First(NeuronPolicy):
    def counts(self, num_layers, width):
        return (8,) * num_layers

    def choose(self, view, count):
        return NeuronChoice(torch.arange(count).expand(len(view.valid), -1))


class Every(TokenPolicy):
    def drop_after(self, num_layers):
        return (0,)

    def choose(self, view):
        scores = torch.where(view.image, 1.0, torch.nan)
        return TokenChoice(view.valid.clone(), scores, torch.ones(len(scores)))


class PlainTokens:
    needs = frozenset()

    def drop_after(self, num_layers):
        return (0,)

    def choose(self, view):
        raise AssertionError


class PlainNeurons:
    def counts(self, num_layers, width):
        return (8,) * num_layers

    def choose(self, view, count):
        raise AssertionError


def test_defaults():
    neurons, tokens = First(), Every()
    assert neurons.needs == tokens.needs == {ACTIVATIONS}
    assert not neurons.per_token and not neurons.gate_thresholds and neurons.decode_ratio == 1.0
    assert not tokens.proportional and tokens.vision_layer == -1


def test_a_subclass_with_the_defaults_runs():
    model = build("llava")
    run = attach(model, TestMethod(Every(), First()))
    try:
        generate(model, make_inputs("llava", model))
        assert run.report.neuron_retention_ratio < 1
    finally:
        detach(model)


@pytest.mark.parametrize(
    ("method", "fix"),
    [
        (TestMethod(PlainTokens()), "tokens is a PlainTokens.*protocol.TokenPolicy"),
        (TestMethod(None, PlainNeurons()), "neurons is a PlainNeurons.*protocol.NeuronPolicy"),
        (TestMethod(First()), "tokens is a First.*protocol.TokenPolicy"),
    ],
)
def test_a_class_that_subclasses_no_policy_is_refused(method, fix):
    model = build("llava")
    with pytest.raises(ConfigError, match=fix):
        attach(model, method)
    assert "forward" not in vars(model)


def test_views_of_one_prefill_recall_the_same_object():
    @dataclass
    class Seen:
        layers: list[int] = field(default_factory=list)

    valid = torch.ones(1, 3, dtype=torch.bool)
    first = PrefillView(0, 4, valid, ~valid)
    second = PrefillView(1, 4, valid, ~valid, memory=first.memory)
    first.recall(Seen).layers.append(first.layer)
    second.recall(Seen).layers.append(second.layer)
    assert first.recall(Seen).layers == [0, 1]
    assert PrefillView(2, 4, valid, ~valid).recall(Seen).layers == []
