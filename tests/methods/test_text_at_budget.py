"""Methods at a budget, by text."""

from dataclasses import dataclass, field

import pytest

from corematching.errors import ConfigError
from corematching.lab.evaluate import make_methods
from corematching.methods import BaseMethod, method_from_text, method_names, text_at_budget
from corematching.policies.component import REGISTRY

FIXED = ("dense", "released-code", "sparsifier")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fastv", "fastv:keep_ratio=0.1"),
        ("fastv:layer=2", "fastv:layer=2,keep_ratio=0.1"),
        ("pyramiddrop:layer=[1,2,3]", "pyramiddrop:layer=[1,2,3],keep_ratio=0.1"),
        ("corematching:layer=[0.1,0.3]", "corematching:layer=[0.1,0.3],keep_ratio=0.1"),
        ("griffin", "griffin:neuron_ratio=0.1"),
        ("teal", "teal:active_ratio=0.1"),
        ("prumerge", "prumerge:keep_ratio=0.1"),
        ("corematching", "corematching:keep_ratio=0.1"),
        ("corematching:score=none", "corematching:score=none,neurons=top(ratio=0.1)"),
        ("corematching:keep_tokens=64", "corematching:keep_tokens=64,neurons=top(ratio=0.1)"),
        ("corematching:budget=knee", "corematching:budget=knee,neurons=top(ratio=0.1)"),
        (
            "corematching:keep_ratio=0.5,neurons=gate(0.4,among=top(dense_first=0))",
            "corematching:keep_ratio=0.5,"
            "neurons=gate(active_ratio=0.4,among=top(dense_first=0,ratio=0.1))",
        ),
        ("random:keep_ratio=1.0", "random:keep_ratio=1.0,neuron_ratio=0.1"),
        ("oracle:neuron_ratio=0.5", "oracle:neuron_ratio=0.5,keep_ratio=0.1"),
        ('{"name": "fastv"}', '{"name": "fastv", "keep_ratio": 0.1}'),
        ("random:keep=1.0", "random:keep_ratio=1.0,neuron_ratio=0.1"),
    ],
)
def test_the_budget_goes_to_the_method_s_own_parameter(text, expected):
    assert text_at_budget(text, 0.1) == expected
    method_from_text(expected)


@pytest.mark.parametrize("name", [name for name in method_names() if name not in FIXED])
def test_every_method_has_a_budget(name):
    method_from_text(text_at_budget(name, 0.25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("released-code", "run it without --budget"),
        ("fastv:keep_ratio=0.5", "it states keep_ratio, leave that out"),
        ("random:keep_ratio=0.5,neuron_ratio=1.0", "it states keep_ratio and neuron_ratio"),
        ("corematching:keep_ratio=0.5,neurons=gate", "it states keep_ratio and neurons"),
        ("fastw", "did you mean 'fastv'"),
        ("fastv:kep_ratio=0.2", "did you mean 'keep_ratio'"),
    ],
)
def test_methods_without_an_open_budget_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        text_at_budget(text, 0.1)


def test_a_user_s_method_has_one_by_its_parameter_s_name():
    try:

        @dataclass(frozen=True)
        class Mine(BaseMethod, name="my-method"):
            neuron_ratio: float = field(default=0.5, metadata={"help": "neurons kept"})

        assert text_at_budget("my-method", 0.1) == "my-method:neuron_ratio=0.1"
    finally:
        REGISTRY["method"].pop("my-method", None)


def test_methods_times_budgets():
    made = make_methods(["fastv", "dense", "griffin"], [0.1, 0.2])
    assert list(made) == [
        "dense",
        "fastv:keep_ratio=0.1",
        "fastv:keep_ratio=0.2",
        "griffin:neuron_ratio=0.1",
        "griffin:neuron_ratio=0.2",
    ]
    assert list(make_methods(["fastv"])) == ["dense", "fastv"]
    with pytest.raises(ConfigError, match=r"keep_ratio=1\.5"):
        make_methods(["fastv"], [1.5])
