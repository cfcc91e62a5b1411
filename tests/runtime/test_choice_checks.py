"""A policy's wrong choice meets the same error with every engine, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from corematching.backends.choice_checks import check_neurons, check_tokens
from corematching.backends.cpu.native import find_kernels
from corematching.errors import InvalidTensorError
from corematching.protocol import NeuronChoice
from corematching.runtime import attach, detach
from tests.models import WIDTH, build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod

ENGINES = ["torch", pytest.param("native", marks=pytest.mark.skipif(not find_kernels(), reason=""))]


def _set(indices, place, value):
    changed = indices.clone()
    changed[0, place] = value
    return changed


WRONG_INDICES = {
    "int32": lambda x: x.int(),
    "float": lambda x: x.float(),
    "too large": lambda x: _set(x, -1, WIDTH),
    "far too large": lambda x: _set(x, -1, 2**40),
    "negative": lambda x: _set(x, 0, -1),
    "descending": lambda x: x.flip(1),
    "twice": lambda x: _set(x, 1, int(x[0, 0])),
    "one dimension": lambda x: x[0],
    "short": lambda x: x[:, 1:],
    "a list": lambda x: x.tolist(),
}


@dataclass
class Wrong(RandomNeurons):
    change: str = ""
    late: bool = False

    def choose(self, view, count):
        choice = super().choose(view, count)
        indices = WRONG_INDICES[self.change](choice.indices)
        return (
            NeuronChoice(later=lambda: {"indices": indices}) if self.late else NeuronChoice(indices)
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", WRONG_INDICES)
def test_wrong_indices_are_refused(change, late, engine):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    attach(model, TestMethod(None, Wrong((1, 2), change=change, late=late)), engine)
    try:
        with pytest.raises(InvalidTensorError, match="neuron indices"), torch.no_grad():
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    finally:
        detach(model)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"mean": torch.zeros(2, 9)}, "expected means"),
        ({"mean": torch.zeros(2, 10, dtype=torch.long)}, "expected means"),
        ({"input_threshold": torch.zeros(3)}, "expected thresholds"),
        ({"gate_threshold": torch.zeros(2, 1)}, "expected thresholds"),
        ({"output_threshold": torch.zeros(2, dtype=torch.bool)}, "expected thresholds"),
    ],
)
def test_wrong_means_and_thresholds_are_refused(wrong, match):
    good = NeuronChoice(torch.tensor([[0, 4, 9], [1, 2, 3]]), torch.zeros(2, 10))
    check_neurons(good, 3, 10)
    with pytest.raises(InvalidTensorError, match=match):
        check_neurons(replace(good, **wrong), 3, 10)


WRONG_TOKENS = {
    "short mask": lambda c: replace(c, keep=c.keep[:, 1:]),
    "float mask": lambda c: replace(c, keep=c.keep.float()),
    "index mask": lambda c: replace(c, keep=c.keep.long()),
    "no weight": lambda c: replace(c, weights=0 * c.weights),
    "negative weights": lambda c: replace(c, weights=-c.weights),
    "infinite weights": lambda c: replace(c, weights=c.weights / 0),
    "NaN weights": lambda c: replace(c, weights=c.weights * torch.nan),
    "short weights": lambda c: replace(c, weights=c.weights[:, 1:]),
    "whole weights": lambda c: replace(c, weights=c.weights.long()),
    "short states": lambda c: replace(c, hidden=torch.zeros(1, 2, 3)),
}


@dataclass
class WrongTokens(RandomTokens):
    change: str = field(default="")

    def choose(self, view):
        return WRONG_TOKENS[self.change](super().choose(view))


@pytest.mark.parametrize("change", WRONG_TOKENS)
def test_wrong_tokens_are_refused(change):
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, TestMethod(WrongTokens((1,), (1,), change=change)), "torch")
    try:
        with pytest.raises(InvalidTensorError, match="after layer 1"), torch.no_grad():
            model(**inputs)
    finally:
        detach(model)


def test_what_a_dropped_token_counts_for_does_not_matter():
    policy = RandomTokens((1,), (1,))
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, TestMethod(policy), "torch")
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        detach(model)
    choice = policy.choose(policy.seen[0])
    choice.weights[~choice.keep] = 0
    check_tokens(choice, policy.seen[0].valid, torch.zeros(*choice.keep.shape, 8), 1)
