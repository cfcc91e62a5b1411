from __future__ import annotations

import pytest

from corematching import CoreMatching, CoreOverlap, GateThreshold, Knee, Paper, TopNeurons
from corematching.cli.method_options import build_method, build_text_method
from corematching.errors import ConfigError
from corematching.old_names import OldNameWarning


def test_defaults_are_the_method_itself():
    assert build_method("corematching", {"--keep-ratio": None}) == CoreMatching()


def test_options_reach_the_parameters():
    options = {"--score": "norm", "--keep-ratio": 0.5, "--layer": "2", "--neurons": "top(0.25)"}
    ours = CoreMatching(score="norm", keep_ratio=0.5, layer=2, neurons=TopNeurons(0.25))
    assert build_method("corematching", options) == ours
    assert build_method("corematching", {"--layer": "0.5"}).layer == 0.5
    assert build_method("random", {"--neuron-ratio": 0.25}).neuron_ratio == 0.25
    assert build_method("cats", {"--active-ratio": 0.25}).active_ratio == 0.25


def test_one_token_is_not_all_tokens():
    one, every = ({"--keep-tokens": 1}, {"--keep-ratio": 1.0})
    assert build_method("corematching", one) == CoreMatching(keep_tokens=1)
    assert build_method("corematching", every) == CoreMatching(keep_ratio=1)


def test_none_keeps_all():
    assert build_method("corematching", {"--score": "none"}).tokens is None
    assert build_method("corematching", {"--neurons": "none"}).neurons is None


def test_scores_take_parameters():
    method = build_method("corematching", {"--score": "core-overlap(0.1,core_ratio=0.5)"})
    assert method.tokens.score == CoreOverlap(0.1, 0.5)


def test_options_join_parameters_in_the_name():
    assert build_method("paper:top_ratio=0.1", {"--keep-ratio": 1}) == Paper(1.0, top_ratio=0.1)
    text = "corematching:layer=[0.1,0.3],keep_ratio=[0.5,0.2]"
    gate = GateThreshold(0.25, among=TopNeurons(0.5))
    ours = CoreMatching((0.5, 0.2), layer=(0.1, 0.3), neurons=gate)
    assert build_method(text, {"--neurons": "gate(0.25,among=top(0.5))"}) == ours
    assert build_method('{"name": "fastv"}', {"--layer": "3"}).layer == 3


def test_options_of_version_0_1():
    with pytest.warns(OldNameWarning):
        method = build_method(
            "corematching", {"--tokens": "norm", "--keep": "0.5", "--after": 2, "--neurons": "0.25"}
        )
    ours = CoreMatching(score="norm", keep_ratio=0.5, layer=2, neurons=TopNeurons(0.25))
    assert method == ours
    with pytest.warns(OldNameWarning):
        method = build_method("corematching", {"--keep": "knee", "--neuron-score": "none"})
    assert method == CoreMatching(budget=Knee(cover=0.9), neurons=None)
    with pytest.warns(OldNameWarning):
        assert build_method("paper:rho=0.1", {"--keep": "1"}) == Paper(1.0, top_ratio=0.1)
    with pytest.warns(OldNameWarning):
        assert build_method("random", {"--neurons": "0.25"}).neuron_ratio == 0.25
    with pytest.warns(OldNameWarning):
        method = build_method("corematching:firing=0.25", {"--neurons": "0.5"})
    assert method.neurons == GateThreshold(0.25, among=TopNeurons(0.5))


def test_a_text_only_model_gets_no_token_score():
    method = build_text_method("corematching:keep_ratio=0.2", {"--neurons": "top(0.25)"})
    assert method == CoreMatching(score=None, neurons=TopNeurons(0.25))
    assert build_text_method("corematching:score=norm", {}).tokens is not None
    assert build_text_method("corematching", {"--score": "norm"}).tokens is not None
    assert build_text_method("griffin", {}) == build_method("griffin", {})


@pytest.mark.parametrize("option", ["--keep-ratio", "--neuron-ratio", "--active-ratio"])
@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, 64.0, float("nan"), float("inf")])
def test_ratio_outside_its_range(option, ratio):
    name = {"--keep-ratio": "corematching", "--neuron-ratio": "griffin", "--active-ratio": "cats"}
    with pytest.raises(ConfigError, match=rf"{option} .* is outside \(0, 1\]"):
        build_method(name[option], {option: ratio})


def test_a_count_in_a_ratio_s_place_gets_the_option_for_counts():
    with pytest.raises(ConfigError, match="a number of tokens: --keep-tokens"):
        build_method("corematching", {"--keep-ratio": 64.0})


def test_old_words_that_are_no_ratio():
    with pytest.raises(ConfigError, match="--keep 'most' is no number"):
        build_method("corematching", {"--keep": "most"})


@pytest.mark.parametrize(
    ("text", "options", "hint"),
    [
        ("corematchin", {}, "did you mean 'corematching'"),
        ("papr", {"--keep-ratio": 0.5}, "did you mean 'paper'"),
        ("corematching", {"--score": "text-overlp"}, "did you mean 'text-overlap'"),
        ("corematching", {"--neurons": "top(score=grifin)"}, "did you mean 'griffin'"),
        ("corematching:neuron=none", {}, "did you mean 'neurons'"),
    ],
)
def test_unknown_names_get_the_nearest(text, options, hint):
    with pytest.raises(ConfigError, match=hint):
        build_method(text, options)


@pytest.mark.parametrize(
    ("text", "options", "hint"),
    [
        ("dense", {"--keep-ratio": 0.5}, "'dense' has no option --keep-ratio: leave it out"),
        ("dense", {"--keep": "0.5"}, "'dense' has no option --keep: leave it out"),
        ("griffin", {"--neurons": "none"}, "no option --neurons: its options are --neuron-ratio"),
        ("corematching", {"--neuron-ratio": 0.5}, "its options are .*--neurons"),
        ("fastv:keep_ratio=0.2", {"--keep-ratio": 0.5}, "'keep_ratio' is given twice"),
        ("fastv:keep_tokens=9", {"--keep-ratio": 0.5}, "exclude each other"),
        ("fastv", {"--keep-ratio": 0.5, "--keep-tokens": 3}, "exclude each other"),
        ("fastv", {"--layer": "2", "--after": 3}, "--after sets layer, which another option sets"),
    ],
)
def test_options_that_do_not_fit(text, options, hint):
    with pytest.raises(ConfigError, match=hint):
        build_method(text, options)
