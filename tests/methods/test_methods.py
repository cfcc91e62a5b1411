"""Methods: composed, by name, to JSON and back, on a model and off again."""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch

import corematching
from corematching import (
    CoreMatching,
    CoreOverlap,
    Count,
    DenseEnds,
    GateThreshold,
    Griffin,
    GriffinScore,
    Knee,
    Magnitude,
    NeuronRule,
    Norm,
    Paper,
    PaperScore,
    Ratio,
    Sparsifier,
    StagedRule,
    TextOverlap,
    TokenRule,
    TopNeurons,
    Uniform,
    method_by_name,
    method_from_dict,
    method_names,
)
from corematching.errors import AlreadyInstalledError, ConfigError
from corematching.methods import BaseMethod, method_from_text
from corematching.methods.corematching import STAGES
from corematching.policies.component import REGISTRY
from corematching.protocol import VisionView
from corematching.runtime import is_attached
from tests.models import build
from tests.policies.views import make_view


@pytest.fixture(scope="module")
def model():
    return build("llava")


def test_paper_is_the_published_rule():
    paper = CoreMatching.paper()
    assert paper == Paper() == method_by_name("paper")
    score = CoreOverlap(top_ratio=0.2, core_ratio=0.4)
    assert paper.tokens == TokenRule(score, Knee(strict=True), (6 / 32,))
    schedule = DenseEnds(0.4, first=6 / 32, last=5 / 32, multiple=1)
    assert paper.neurons == NeuronRule(PaperScore(top_ratio=0.2), schedule, compensate=False)
    assert paper.tokens.drop_after(32) == (5,)
    counts = paper.neurons.counts(32, 11008)
    assert counts == (11008,) * 6 + (4403,) * 21 + (11008,) * 5


def test_paper_takes_changes():
    changed = CoreMatching.paper(neuron_ratio=0.3, top_ratio=0.1)
    assert changed.tokens.score == CoreOverlap(top_ratio=0.1, core_ratio=0.3)
    assert changed.neurons.score == PaperScore(0.1) and changed.neurons.schedule.ratio == 0.3
    assert CoreMatching.paper(keep_tokens=7).tokens.budget == Count(7)
    assert len(CoreMatching.paper(keep_ratio=0.2, layer=(0.1, 0.3)).tokens.budgets) == 2


def test_default_is_not_the_paper_and_says_how():
    ours = CoreMatching()
    assert ours != CoreMatching.paper()
    assert isinstance(ours.tokens.score, TextOverlap) and ours.neurons == GateThreshold(0.6)
    assert ours.neurons.decode_ratio < 1 and TopNeurons().rule.compensate
    assert ours.tokens.proportional and not CoreMatching.paper().tokens.proportional


@pytest.mark.parametrize(
    ("amount", "budget"),
    [
        ({}, Ratio(0.3, cover=0.9)),
        ({"keep_ratio": 0.25}, Ratio(0.25, cover=0.9)),
        ({"keep_ratio": 1}, Ratio(1.0, cover=0.9)),
        ({"keep_tokens": 1}, Count(1, cover=0.9)),
        ({"keep_tokens": 64, "cover": 0.0}, Count(64)),
        ({"budget": Knee(max_ratio=0.5)}, Knee(max_ratio=0.5)),
        ({"budget": "knee"}, Knee()),
        ({"budget": Ratio(0.3, min_tokens=16)}, Ratio(0.3, min_tokens=16)),
    ],
)
def test_amounts_of_tokens(amount, budget):
    assert CoreMatching(**amount).tokens.budget == budget


def test_a_ratio_of_one_is_all_and_a_float_in_every_spelling():
    methods = [CoreMatching(keep_ratio=1), method_from_text("corematching:keep_ratio=1")]
    for method in [*methods, method_from_dict({"name": "corematching", "keep_ratio": 1})]:
        assert method == CoreMatching(keep_ratio=1.0) and type(method.keep_ratio) is float


def test_scores_and_rules_may_be_objects_or_names():
    score = TextOverlap(rarity=1.0)
    assert CoreMatching(score=score).tokens.score is score
    assert CoreMatching(score="norm").tokens.score == Norm()
    assert TopNeurons(score="magnitude").rule.score == Magnitude()
    assert CoreMatching(neurons=NeuronRule(Magnitude(), Uniform(0.5))).neurons.schedule.ratio == 0.5


def test_either_half_may_be_none():
    assert CoreMatching(score=None).tokens is None
    assert CoreMatching(neurons=None).neurons is None
    assert Sparsifier().tokens is None and Sparsifier().neurons is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"keep_ratio": 0.3, "keep_tokens": 64}, "exclude each other: give one"),
        ({"keep_ratio": 64}, "give a ratio in .*keep_tokens=64 is that number"),
        ({"keep_tokens": 0.3}, "whole number of at least 1; keep_ratio=0.3 is that ratio"),
        ({"keep_tokens": True}, "keep_tokens=True"),
        ({"keep_ratio": True}, "keep_ratio=True"),
        ({"budget": Knee(), "keep_ratio": 0.3}, "budget says .* leave out keep_ratio"),
        ({"budget": Knee(), "cover": 0.5}, "cover is a parameter of the budget: leave out cover"),
        ({"score": None, "keep_ratio": 0.3}, "score=None keeps all tokens: leave out keep_ratio"),
        ({"score": None, "layer": 2, "cover": 0.5}, "leave out layer, cover"),
        ({"score": None, "proportional": False}, "leave out proportional"),
        ({"taper": 0.5}, "taper is for several layers .* leave out taper"),
        ({"layer": (1, 2), "keep_tokens": (4, 2), "taper": 0.5}, "leave out taper"),
        ({"score": Griffin()}, "give a TokenScore"),
        ({"neurons": Griffin()}, "give a NeuronPolicy"),
    ],
)
def test_what_would_do_nothing_is_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        CoreMatching(**params)


@pytest.mark.parametrize("rule", [GateThreshold, TopNeurons])
def test_rules_take_only_what_applies_to_them(rule):
    other = {"ratio": 0.5} if rule is GateThreshold else {"active_ratio": 0.5}
    with pytest.raises(TypeError, match="unexpected keyword"):
        rule(**other)
    with pytest.raises(TypeError, match="unexpected keyword"):
        CoreMatching(dense_frist=2)


def test_a_method_in_a_score_s_place_gets_the_score_s_name():
    with pytest.raises(ConfigError, match=r"give a NeuronScore, such as GriffinScore\(\)"):
        NeuronRule(Griffin(), Uniform(0.5))


@pytest.mark.parametrize(
    "method",
    [
        CoreMatching(),
        CoreMatching(layer=(2, 0.5), keep_tokens=32, taper=0.25),
        CoreMatching(layer=(2, 3), budget=(Ratio(0.5, min_tokens=9), Count(4))),
        CoreMatching(score=TextOverlap(rarity=0.5), neurons=None, budget=Knee(max_tokens=64)),
        CoreMatching(score=None, neurons=GateThreshold(0.5, among=TopNeurons(0.4, dense_first=2))),
        CoreMatching(neurons=TopNeurons(score=GriffinScore(token_set="text"), compensate=False)),
        CoreMatching(neurons=GateThreshold(among=NeuronRule(PaperScore(), Uniform(0.5)))),
        CoreMatching.paper(),
        CoreMatching.paper(keep_ratio=(0.5, 0.2), layer=(0.1, 0.3)),
        Sparsifier(),
        Sparsifier(TokenRule(CoreOverlap(), Knee(min_ratio=0.1), (1, 0.5)), None),
        Sparsifier(StagedRule(CoreOverlap(), (Ratio(0.5), Count(9)), (1, 0.5))),
        Sparsifier(None, NeuronRule(PaperScore(), Uniform(0.5), compensate=True)),
        *(method_by_name(name) for name in method_names()),
    ],
    ids=lambda method: method.name,
)
def test_round_trip_through_json(method):
    values = json.loads(json.dumps(method.to_dict()))
    assert method_from_dict(values) == method
    assert type(method).from_dict(values) == method


@pytest.mark.parametrize("name", [name for name in method_names() if name != "oracle"])
def test_every_named_method_chooses(name):  # the oracle needs the scenes that a task shows it
    method = method_by_name(name)
    view = make_view(
        ["ttiiiiiitt", "..tiiiiiit"],
        torch.randn(2, 10, 32),
        embeddings=torch.randn(2, 10, 8),
        hidden=torch.randn(2, 10, 8),
        attention=lambda rows: torch.rand(2, 4, rows.shape[1], 10),
        contributions=lambda: torch.randn(2, 10, 8),
        inputs=torch.randn(2, 10, 8),
        gate=lambda rows: torch.randn(2, rows.shape[1], 32),
        vision=VisionView(
            queries=torch.randn(2, 2, 7, 4),
            keys=torch.randn(2, 2, 7, 4),
            scaling=0.5,
            classes=1,
            features=torch.randn(2, 6, 5),
            project=torch.nn.Linear(5, 8),
        ),
    )
    if method.tokens is not None:
        view.layer = method.tokens.drop_after(view.num_layers)[0]
        with torch.no_grad():
            choice = method.tokens.choose(view)
        assert (choice.keep & view.text).equal(view.text)
        assert not (choice.keep & ~view.valid).any()
        assert (choice.keep & view.image).any(1).all()
    if method.neurons is not None:
        indices = method.neurons.choose(view, 12).materialize().indices
        assert indices.shape == (2, 12)
        assert (indices.diff(dim=1) > 0).all() and indices.max() < 32


@pytest.mark.parametrize(
    "make", [lambda: Sparsifier(tokens="norm"), lambda: Sparsifier(neurons=GriffinScore())]
)
def test_what_is_no_policy_is_refused(make):
    with pytest.raises(ConfigError, match="Policy"):
        make()


def test_another_method_is_one_class():
    try:

        @dataclass(frozen=True)
        class FirstOnes(BaseMethod, name="first-ones"):
            neuron_ratio: float = field(default=0.5, metadata={"help": "ratio of neurons"})

            def make_neurons(self):
                return NeuronRule(GriffinScore(), Uniform(self.neuron_ratio))

        method = method_from_text("first-ones:neuron_ratio=0.25")
        assert method == FirstOnes(0.25) and method.tokens is None
        assert method.neurons.schedule.ratio == 0.25 and "first-ones" in method_names()
        assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
        with pytest.raises(ConfigError, match="taken"):

            class Second(BaseMethod, name="first-ones"):
                pass
    finally:
        REGISTRY["method"].pop("first-ones", None)


def test_methods_are_values():
    assert CoreMatching() == CoreMatching() and hash(CoreMatching()) == hash(CoreMatching())
    assert replace(CoreMatching(), neurons=TopNeurons(0.5)).neurons.ratio == 0.5
    assert replace(CoreMatching(), keep_ratio=0.1).tokens.after == STAGES
    same = pickle.loads(pickle.dumps(CoreMatching(keep_tokens=3)))
    assert same == CoreMatching(keep_tokens=3) and same.tokens == CoreMatching(keep_tokens=3).tokens
    assert all(item.metadata.get("help") for item in fields(CoreMatching))


def test_with_block_installs_and_removes(model):
    method = CoreMatching()
    with method(model) as run:
        assert is_attached(model) and run.method is method
    assert not is_attached(model)


def test_with_block_removes_after_an_exception(model):
    with pytest.raises(RuntimeError, match="inside"), CoreMatching()(model):
        raise RuntimeError("inside")
    assert not is_attached(model)


def test_install_stays_until_remove(model):
    method = Sparsifier(TokenRule(CoreOverlap(), Ratio(0.5), (1,)))
    method.install(model)
    try:
        with pytest.raises(AlreadyInstalledError):
            method.install(model)
        with pytest.raises(AlreadyInstalledError), CoreMatching()(model):
            pass
        assert is_attached(model)
    finally:
        method.remove(model)
    assert not is_attached(model)


def test_exports():
    assert all(hasattr(corematching, name) for name in corematching.__all__ if name != "load_demo")
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = corematching.nothing_here
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert f'version = "{corematching.__version__}"' in pyproject.read_text(encoding="utf-8")


def test_import_leaves_transformers_alone():
    code = "import sys, corematching; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
