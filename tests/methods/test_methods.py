"""Methods: composed, by name, to JSON and back, on a model and off again."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import corematching
from corematching import (
    CoreMatching,
    CoreOverlap,
    Count,
    DenseEnds,
    Griffin,
    Knee,
    NeuronRule,
    Paper,
    Ratio,
    Sparsifier,
    TextOverlap,
    TokenRule,
    Uniform,
    method_by_name,
    method_from_dict,
    method_names,
)
from corematching.errors import AlreadyInstalledError, ConfigError
from corematching.methods import METHODS, method_from_text, register_method
from corematching.protocol import VisionView
from corematching.runtime import is_attached
from tests.models import build
from tests.policy.views import make_view


@pytest.fixture(scope="module")
def model():
    return build("llava")


def test_paper_is_the_published_rule():
    paper = CoreMatching.paper()
    assert paper.tokens == TokenRule(CoreOverlap(rho=0.2, beta=0.4), Knee(strict=True), (6 / 32,))
    schedule = DenseEnds(0.4, first=6 / 32, last=5 / 32, multiple=1)
    assert paper.neurons == NeuronRule(Paper(rho=0.2), schedule, compensate=False)
    assert paper.tokens.drop_after(32) == (5,)
    counts = paper.neurons.counts(32, 11008)
    assert counts == (11008,) * 6 + (4403,) * 21 + (11008,) * 5


def test_paper_takes_changes():
    assert CoreMatching.paper(beta=0.3).beta == 0.3
    assert CoreMatching.paper(beta=0.3).tokens.score == CoreOverlap(rho=0.2, beta=0.3)


def test_default_is_not_the_paper_and_says_how():
    ours = CoreMatching()
    assert ours != CoreMatching.paper()
    assert isinstance(ours.tokens.score, TextOverlap) and isinstance(ours.neurons.score, Griffin)
    assert ours.neurons.compensate and ours.neurons.decode_share < 1
    assert ours.tokens.proportional and not CoreMatching.paper().tokens.proportional


@pytest.mark.parametrize(("keep", "budget"), [(0.25, Ratio(0.25)), (64, Count(64)), (None, Knee())])
def test_keep_means_share_count_or_knee(keep, budget):
    assert CoreMatching(keep=keep, cover=0.0).tokens.budget == budget


def test_cover_reaches_the_budget():
    assert CoreMatching(cover=0.4).tokens.budget.cover == 0.4
    assert CoreMatching.paper().tokens.budget.cover == 0


def test_rho_and_beta_reach_the_scores():
    method = CoreMatching(token_score="core-overlap", neuron_score="magnitude", rho=0.1, beta=0.5)
    assert method.tokens.score == CoreOverlap(rho=0.1, beta=0.5)
    assert method.neurons.score.share == 0.1 and method.neurons.schedule.share == 0.5


def test_a_score_may_be_an_object():
    score = TextOverlap(rarity=1.0)
    assert CoreMatching(token_score=score).tokens.score is score


def test_either_half_may_be_none():
    assert CoreMatching(token_score=None).tokens is None
    assert CoreMatching(neuron_score=None).neurons is None
    assert Sparsifier().tokens is None and Sparsifier().neurons is None


@pytest.mark.parametrize(
    "method",
    [
        CoreMatching(),
        CoreMatching(layer=(2, 0.5), keep=32, floor=0.1, ceiling=64),
        CoreMatching(token_score=TextOverlap(rarity=0.5), neuron_score=Griffin(over="text")),
        CoreMatching.paper(),
        Sparsifier(),
        Sparsifier(TokenRule(CoreOverlap(), Knee(floor=0.1), (1, 0.5)), None),
        Sparsifier(None, NeuronRule(Paper(), Uniform(0.5), compensate=True)),
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
        indices = method.neurons.choose(view, 12).settle().indices
        assert indices.shape == (2, 12)
        assert (indices.diff(dim=1) > 0).all() and indices.max() < 32


def test_methods_by_text():
    assert method_from_text("corematching") == CoreMatching()
    assert method_from_text("paper:beta=0.5, keep=0.2") == CoreMatching.paper(beta=0.5, keep=0.2)
    assert method_from_text("corematching:layer=[2,6],keep=none,token_score=norm") == CoreMatching(
        layer=(2, 6), keep=None, token_score="norm"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corematchin", "did you mean 'corematching'"),
        ("corematching:bata=0.3", "did you mean 'beta'"),
        ("paper:bata=0.3", "did you mean 'beta'"),
        ("dense:beta=0.3", "unknown parameter"),
        ("corematching:beta", "param=value"),
        ("corematching:keep=1.5", r"keep=1.5: give a share as a float in \(0, 1\]"),
        ("corematching:keep=0", "keep=0"),
        ("corematching:rho=0", r"rho=0: give a share in \(0, 1\]"),
        ("corematching:beta=2", "beta=2"),
        ("corematching:token_score=core-overlop", "did you mean 'core-overlap'"),
        ("corematching:neuron_score=grifin", "did you mean 'griffin'"),
        ("corematching:layer=-2", "layer=-2"),
        ("corematching:layer=1.0", "layer=1.0"),
        ("corematching:dense_first=-1", "dense_first=-1"),
        ("corematching:floor=0.5,ceiling=0.2", "floor=0.5 is above ceiling=0.2"),
        ("corematching:compensate=1", "compensate=1"),
        ("corematching:multiple=0", "multiple=0"),
    ],
)
def test_wrong_text_is_refused_with_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(text)


@pytest.mark.parametrize(
    "make", [lambda: Sparsifier(tokens="norm"), lambda: Sparsifier(neurons=Griffin())]
)
def test_what_is_no_policy_is_refused(make):
    with pytest.raises(ConfigError, match="Policy"):
        make()


def test_another_method_is_one_function():
    try:

        @register_method("first-ones")
        def first_ones(share: float = 0.5) -> Sparsifier:
            return Sparsifier(neurons=NeuronRule(Griffin(), Uniform(share)))

        assert method_from_text("first-ones:share=0.25") == first_ones(0.25)
        with pytest.raises(ConfigError, match="taken"):
            register_method("first-ones")(Sparsifier)
    finally:
        METHODS.pop("first-ones", None)


def test_methods_are_values():
    assert CoreMatching() == CoreMatching() and hash(CoreMatching()) == hash(CoreMatching())
    assert replace(CoreMatching(), beta=0.5).neurons.schedule.share == 0.5
    assert all(field.metadata.get("help") for field in fields(CoreMatching))


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
