"""Methods at a budget, by text."""

import pytest

from corematching.errors import ConfigError
from corematching.evaluate import make_methods
from corematching.methods import METHODS, method_from_text, register_method, text_at_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fastv", "fastv:keep=0.1"),
        ("fastv:layer=2", "fastv:layer=2,keep=0.1"),
        ("pyramiddrop:layer=[1,2,3]", "pyramiddrop:layer=[1,2,3],keep=0.1"),
        ("corematching:layer=[0.1,0.3]", "corematching:layer=[0.1,0.3],keep=0.1"),
        ("griffin", "griffin:beta=0.1"),
        ("teal", "teal:beta=0.1"),
        ("prumerge", "prumerge:keep=0.1"),
        ("corematching", "corematching:keep=0.1"),
        ("corematching:token_score=none", "corematching:token_score=none,beta=0.1,firing=none"),
        ("corematching:keep=0.5,firing=0.4", "corematching:keep=0.5,firing=0.4,beta=0.1"),
        ("random:keep=1.0", "random:keep=1.0,beta=0.1"),
        ("oracle:beta=0.5", "oracle:beta=0.5,keep=0.1"),
    ],
)
def test_the_budget_goes_to_the_method_s_own_parameter(text, expected):
    assert text_at_budget(text, 0.1) == expected
    method_from_text(expected)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("dense", "released-code")]
)
def test_every_method_has_a_budget(name):
    method_from_text(text_at_budget(name, 0.25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("released-code", "run it without --budget"),
        ("fastv:keep=0.5", "besides keep, which it states: leave that out"),
        ("random:keep=0.5,beta=1.0", "besides keep and beta"),
        ("fastw", "did you mean 'fastv'"),
        ("fastv:kep=2", "did you mean 'keep'"),
    ],
)
def test_methods_without_an_open_budget_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        text_at_budget(text, 0.1)


def test_a_budget_that_is_no_parameter_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        register_method("first", budgets=("kep",))(lambda keep=1.0: None)
    assert "first" not in METHODS


def test_methods_times_budgets():
    made = make_methods(["fastv", "dense", "griffin"], [0.1, 0.2])
    assert list(made) == [
        "dense",
        "fastv:keep=0.1",
        "fastv:keep=0.2",
        "griffin:beta=0.1",
        "griffin:beta=0.2",
    ]
    assert list(make_methods(["fastv"])) == ["dense", "fastv"]
    with pytest.raises(ConfigError, match=r"keep=1\.5"):
        make_methods(["fastv"], [1.5])
