"""Components by name, and to JSON and back."""

import json
from dataclasses import dataclass, fields

import pytest
import torch

from corematching.errors import ConfigError
from corematching.policy import (
    Budget,
    Component,
    Count,
    DenseEnds,
    Knee,
    PerLayer,
    Ratio,
    Schedule,
    TextOverlap,
    TokenScore,
    Uniform,
    names,
    neuron_score_by_name,
    score_by_name,
)
from corematching.policy.component import REGISTRY


@pytest.mark.parametrize(
    "component",
    [
        Knee(min_ratio=0.1, max_tokens=200, strict=False),
        Ratio(0.25, min_tokens=16),
        Count(3),
        Uniform(0.5, multiple=4),
        DenseEnds(0.4, first=2, last=0.1),
        PerLayer(layer_ratios=(0.5, 1.0)),
    ],
    ids=repr,
)
def test_round_trip_through_json(component):
    base = Budget if isinstance(component, Budget) else Schedule
    assert base.from_dict(json.loads(json.dumps(component.to_dict()))) == component


def test_names_take_either_dash_and_any_case():
    assert score_by_name("Text_Overlap", top_ratio=0.3) == TextOverlap(top_ratio=0.3)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'core-overlap'"):
        score_by_name("core-overlop")
    with pytest.raises(ConfigError, match="did you mean 'griffin'"):
        neuron_score_by_name("grifin")
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        Budget.from_dict({"name": "ratios"})
    with pytest.raises(ConfigError, match="did you mean 'top_ratio'"):
        score_by_name("text-overlap", top_rati=0.2)


@pytest.mark.parametrize("values", [{}, [], "ratio", None])
def test_from_dict_says_what_it_wants(values):
    with pytest.raises(ConfigError, match="name"):
        Budget.from_dict(values)


def test_a_class_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="is a Count, not a Ratio"):
        Ratio.from_dict({"name": "count"})


def test_every_parameter_has_a_help_text():
    for kind in REGISTRY:
        for name in names(kind):
            for field in fields(REGISTRY[kind][name]):  # type: ignore[arg-type]
                if not field.init:
                    continue
                assert field.metadata.get("help"), f"{kind} {name}: {field.name}"


def test_another_score_is_one_class():
    try:

        @dataclass(frozen=True)
        class First(TokenScore, name="first-tokens"):
            needs = frozenset()

            def score(self, view):
                return -torch.arange(view.valid.shape[1]).expand_as(view.valid)

        assert isinstance(score_by_name("first-tokens"), First)

        with pytest.raises(ConfigError, match="taken"):

            class Second(TokenScore, name="first-tokens"):
                pass
    finally:
        REGISTRY["token score"].pop("first-tokens", None)


def test_components_are_frozen_and_compare_by_value():
    assert Ratio(0.2) == Ratio(0.2) and hash(Ratio(0.2)) == hash(Ratio(0.2))
    with pytest.raises(AttributeError):
        Ratio(0.2).keep_ratio = 0.3  # type: ignore[misc]
    assert issubclass(Ratio, Component)
