"""What a cache remembers of its prompt follows its rows and columns, or the operation is refused."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.methods import method_from_text
from corematching.runtime import attach, detach
from corematching.runtime.decode.graph import GraphSteps
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod
from tests.runtime.test_graph import StandIn
from tests.runtime.turns import Turns, assert_close

ENGINES = ("torch", "auto", "native", "replayed")
BATCH = 3


@dataclass
class LimitedNeurons(RandomNeurons):
    """Random neurons with thresholds that differ from sample to sample."""

    per_token: bool = True

    def pick(self, layer, width, count):
        choice = super().pick(layer, width, count)
        least = torch.tensor([0.02 * seed for seed in self.seeds])
        return replace(choice, gate_threshold=least, output_threshold=least / 2)


@dataclass
class LateNeurons(RandomNeurons):
    """Random neurons that are known when a token is about to be decoded."""

    def choose(self, view, count):
        choice = super().choose(view, count)
        late = {"indices": choice.indices, "mean": choice.mean}
        return replace(choice, indices=None, mean=None, later=lambda: late)


def make_method(kind, samples=range(BATCH)):
    """A method for a batch of these samples; each chooses the same in any batch."""
    seeds = tuple(sample + 1 for sample in samples)
    tokens = RandomTokens((0, 2), seeds, share=0.6)
    return {
        "weights": lambda: TestMethod(tokens),
        "neurons": lambda: TestMethod(None, RandomNeurons(seeds)),
        "means": lambda: TestMethod(tokens, RandomNeurons(seeds, compensated=True)),
        "limits": lambda: TestMethod(replace(tokens, weighed=False), LimitedNeurons(seeds, True)),
        "late": lambda: TestMethod(tokens, LateNeurons(seeds, compensated=True)),
        "product": lambda: method_from_text("corematching:keep=0.5,layer=1,beta=0.5"),
        "dense neurons": lambda: method_from_text(
            "corematching:keep=0.4,layer=1,neuron_score=none"
        ),
        "rival": lambda: method_from_text("fastv"),
    }[kind]()


KINDS = ("weights", "neurons", "means", "limits", "late", "product", "dense neurons", "rival")


@contextmanager
def at_work(model, method, engine):
    run = attach(model, method, "torch" if engine == "replayed" else engine)
    graph = None
    try:
        if engine == "replayed":
            graph = GraphSteps(run._engine.parts, run._engine.sparse, StandIn)
            run._engine.backend.graph = graph
            graph.install()
        yield run
    finally:
        if graph is not None:
            graph.remove()
            run._engine.backend.graph = None
        detach(model)


def by_hand(change):
    """Replace all layers' keys and values."""

    def run(cache):
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return run


def layer_by_layer(name, argument):
    def run(cache):
        for layer in cache.layers:
            getattr(layer, name)(argument)

    return run


def call(name, argument):
    return lambda cache: getattr(cache, name)(argument)


MOVES = {
    "select a tensor": ([2, 0], call("batch_select_indices", torch.tensor([2, 0]))),
    "select a list": ([1], call("batch_select_indices", [1])),
    "select one": ([2], call("batch_select_indices", torch.tensor([2]))),
    "select from behind": ([2, 1], call("batch_select_indices", torch.tensor([-1, -2]))),
    "select by a mask": (
        [0, 2],
        call("batch_select_indices", torch.tensor([True, False, True])),
    ),
    "select by a list of bool": ([1, 2], call("batch_select_indices", [False, True, True])),
    "select repeatedly": ([1, 1, 0, 1], call("batch_select_indices", torch.tensor([1, 1, 0, 1]))),
    "repeat": ([0, 0, 1, 1, 2, 2], call("batch_repeat_interleave", 2)),
    "repeat unequally": (
        [0, 1, 1, 2],
        call("batch_repeat_interleave", torch.tensor([1, 2, 1])),
    ),
    "reorder": ([2, 0, 1], call("reorder_cache", torch.tensor([2, 0, 1]))),
    "reorder to two": ([1, 1], call("reorder_cache", torch.tensor([1, 1]))),
    "by hand": ([2, 1, 0], by_hand(lambda x: x[[2, 1, 0]])),
    "slice by hand": ([1, 2], by_hand(lambda x: x[1:])),
    "repeat by hand": ([0, 1, 2, 0, 1, 2], by_hand(lambda x: x.repeat(2, 1, 1, 1))),
    "layer by layer": ([1, 0], layer_by_layer("batch_select_indices", torch.tensor([1, 0]))),
    "reorder layer by layer": ([0, 2, 2], layer_by_layer("reorder_cache", torch.tensor([0, 2, 2]))),
}


def converse(turns, rows, change):
    """Steps, a move of the rows, steps, a further prompt, a step: the logits of the last three."""
    turns.feed()
    turns.move(rows, change)
    return turns.feed


def check(turns, logits, model, kind):
    assert_close(logits, turns.expected(model, lambda samples: make_method(kind, samples)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", ["means"])
def test_steps_follow_the_rows(kind, move, engine):
    run_a_move(kind, move, engine)


@pytest.mark.parametrize("engine", ["torch", "auto", "replayed"])
@pytest.mark.parametrize("move", ["select a tensor", "repeat", "reorder", "by hand"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "means"])
def test_every_kind_of_choice_follows_the_rows(kind, move, engine):
    run_a_move(kind, move, engine)


def run_a_move(kind, move, engine):
    model, single = build("llava"), build("llava")
    inputs = make_inputs("llava", model, batch=BATCH)
    rows, change = MOVES[move]
    with at_work(model, make_method(kind), engine):
        turns = Turns(model, inputs)
        turns.feed()
        turns.move(rows, change)
        for length in (1, 1, 3, 1):
            check(turns, turns.feed(length), single, kind)
