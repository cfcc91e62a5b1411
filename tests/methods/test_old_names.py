"""Names of version 0.1: the same policies, a warning that writes the present names."""

import json
import warnings
from pathlib import Path

import pytest

import corematching.policy as policy
from corematching import (
    Attention,
    CoreInferScore,
    CoreMatching,
    CoreOverlap,
    Count,
    DenseEnds,
    GateThreshold,
    GriffinScore,
    Knee,
    Magnitude,
    NeuronRule,
    Norm,
    Paper,
    PaperScore,
    PerLayer,
    RandomNeurons,
    RandomTokens,
    Ratio,
    StagedRule,
    TextOverlap,
    TokenRule,
    TopNeurons,
    Uniform,
    method_by_name,
    method_from_dict,
    method_from_text,
)
from corematching.errors import ConfigError
from corematching.evaluate.board import render
from corematching.evaluate.plot import AXES, group_curves
from corematching.old_names import OldNameWarning

DOCS = Path(__file__).parents[2] / "docs"
OURS = TokenRule(TextOverlap(), Ratio(0.3, cover=0.9), (0.4,), True)
PUBLISHED = TokenRule(CoreOverlap(0.2, 0.4), Knee(), (6 / 32,))


def core(ratio, score=None, first=4 / 32, last=3 / 32, compensate=True, multiple=8):
    """What version 0.1 chose neurons by, once for the whole answer."""
    schedule = DenseEnds(ratio, first=first, last=last, multiple=multiple)
    return NeuronRule(score or GriffinScore(), schedule, compensate)


def rule_of(neurons):
    """A neuron rule by what it is made of."""
    if isinstance(neurons, TopNeurons):
        return neurons.rule
    if isinstance(neurons, GateThreshold):
        return neurons.active_ratio, neurons.among and rule_of(neurons.among)
    return neurons


def ours(**budget):
    return TokenRule(TextOverlap(), Ratio(cover=0.9, **budget), (0.4,), True)


def stages(*amounts, after=(2, 6), **bounds):
    kind = Ratio if isinstance(amounts[0], float) else Count
    budgets = tuple(kind(amount, cover=0.9, **bounds) for amount in amounts)
    return StagedRule(TextOverlap(), budgets, after, True)


CASES = [
    ("corematching", OURS, (0.6, None)),
    ("corematching:keep=0.35", ours(keep_ratio=0.35), (0.6, None)),
    ("corematching:keep=1.0", ours(keep_ratio=1.0), (0.6, None)),
    (
        "corematching:keep=1",
        TokenRule(TextOverlap(), Count(1, cover=0.9), (0.4,), True),
        (0.6, None),
    ),
    (
        "corematching:keep=0.1",
        StagedRule(
            TextOverlap(),
            tuple(Ratio(r, cover=0.9) for r in (0.4, 0.2, 0.1)),
            (9 / 32, 17 / 32, 25 / 32),
            True,
        ),
        (0.6, None),
    ),
    (
        "corematching:keep=none,floor=0.1,ceiling=64,cover=0.5",
        TokenRule(TextOverlap(), Knee(min_ratio=0.1, max_tokens=64, cover=0.5), (0.4,), True),
        (0.6, None),
    ),
    ("corematching:floor=16", ours(keep_ratio=0.3, min_tokens=16), (0.6, None)),
    ("corematching:layer=[2,6],keep=10", stages(20, 10), (0.6, None)),
    ("corematching:layer=[2,6],keep=0.2,taper=0.7", stages(0.2 / 0.7, 0.2), (0.6, None)),
    (
        "corematching:layer=[2,6],keep=[0.5,0.2],taper=0.7,floor=9",
        stages(0.5, 0.2, min_tokens=9),
        (0.6, None),
    ),
    (
        "corematching:layer=[2,6],keep=0.2,ceiling=64",
        stages(0.4, 0.2, max_tokens=64),
        (0.6, None),
    ),
    ("corematching:keep=0.3,layer=[2,6],taper=1.0", stages(0.3, 0.3), (0.6, None)),
    (
        "corematching:keep=0.3,layer=2,taper=0.7",
        TokenRule(OURS.score, OURS.budget, (2,), True),
        (0.6, None),
    ),
    (
        "corematching:token_score=norm,proportional=false,cover=0.0",
        TokenRule(Norm(), Ratio(0.3), (0.4,)),
        (0.6, None),
    ),
    ("corematching:token_score=none,keep=0.2,layer=2,cover=0.5", None, (0.6, None)),
    (
        "corematching:token_score=core-overlap,rho=0.1,beta=0.5,neuron_score=magnitude,firing=none",
        TokenRule(CoreOverlap(0.1, 0.5), Ratio(0.3, cover=0.9), (0.4,), True),
        core(0.5, Magnitude(0.1)),
    ),
    (
        "corematching:token_score=core-overlap",
        TokenRule(CoreOverlap(0.2, 1.0), Ratio(0.3, cover=0.9), (0.4,), True),
        (0.6, None),
    ),
    ("corematching:neuron_score=none,keep=0.2", ours(keep_ratio=0.2), None),
    ("corematching:keep=0.2,firing=0.5", ours(keep_ratio=0.2), (0.5, None)),
    ("corematching:beta=0.4,firing=none", OURS, core(0.4)),
    ("corematching:firing=none", OURS, core(1.0)),
    (
        "corematching:beta=0.8,firing=0.5,dense_first=2,dense_last=0,multiple=4,compensate=false",
        OURS,
        (0.5, core(0.8, None, 2, 0, False, 4)),
    ),
    (
        "corematching:beta=0.7,over=kept,neuron_score=paper,rho=0.3,firing=none",
        TokenRule(TextOverlap(0.3), Ratio(0.3, cover=0.9), (0.4,), True),
        core(0.7, PaperScore(0.3, "kept")),
    ),
    ("corematching:over=kept,dense_first=0", OURS, (0.6, None)),
    ("paper", PUBLISHED, core(0.4, PaperScore(), 6 / 32, 5 / 32, False, 1)),
    (
        "paper:beta=0.3,rho=0.1,keep=0.25",
        TokenRule(CoreOverlap(0.1, 0.3), Ratio(0.25), (6 / 32,)),
        core(0.3, PaperScore(0.1), 6 / 32, 5 / 32, False, 1),
    ),
    ("paper:neuron_score=none", PUBLISHED, None),
    ("paper:token_score=none", None, core(0.4, PaperScore(), 6 / 32, 5 / 32, False, 1)),
    (
        "paper:compensate=true,floor=0.1",
        TokenRule(CoreOverlap(0.2, 0.4), Knee(min_ratio=0.1), (6 / 32,)),
        core(0.4, PaperScore(), 6 / 32, 5 / 32, True, 1),
    ),
    (
        "random:keep=0.2,beta=0.4",
        TokenRule(RandomTokens(), Ratio(0.2), (0.3,)),
        core(0.4, RandomNeurons(), compensate=False),
    ),
    ("fastv:keep=7", TokenRule(Attention(), Count(7), (1,)), None),
    (
        "coreinfer:beta=0.3,rho=0.1",
        None,
        core(0.3, CoreInferScore(0.1), 6 / 32, 5 / 32, False, 1),
    ),
]


@pytest.mark.parametrize(("text", "tokens", "neurons"), CASES, ids=lambda value: str(value)[:60])
def test_old_text_gives_the_same_policies(text, tokens, neurons):
    old = ":" in text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = method_from_text(text)
    assert [issubclass(each.category, OldNameWarning) for each in caught] == [True] * old
    assert method.tokens == tokens and rule_of(method.neurons) == neurons
    with warnings.catch_warnings():
        warnings.simplefilter("error", OldNameWarning)
        assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_old_python_gives_the_same_method():
    with pytest.warns(
        OldNameWarning, match=r"is written corematching: keep_ratio=0.2, neurons=top"
    ):
        old = CoreMatching(keep=0.2, beta=0.4, firing=None)  # type: ignore[call-arg]
    assert old == CoreMatching(keep_ratio=0.2, neurons=TopNeurons(0.4))
    with pytest.warns(OldNameWarning):
        assert CoreMatching.paper(keep=0.3, beta=0.2) == Paper(keep_ratio=0.3, neuron_ratio=0.2)
    with pytest.warns(OldNameWarning):
        compensated = CoreMatching.paper(compensate=True, keep=(0.5, 7), layer=(1, 2))
    assert isinstance(compensated, CoreMatching)
    assert compensated.tokens.budgets == (Ratio(0.5), Count(7))
    with pytest.warns(OldNameWarning):
        assert method_by_name("griffin", beta=0.3) == method_by_name("griffin", neuron_ratio=0.3)


@pytest.mark.parametrize(
    ("make", "now"),
    [
        (lambda: GriffinScore(over="text"), GriffinScore(token_set="text")),
        (lambda: CoreOverlap(rho=0.1, beta=0.3), CoreOverlap(0.1, 0.3)),
        (lambda: TextOverlap(share=0.5), TextOverlap(top_ratio=0.5)),
        (lambda: Ratio(ratio=0.5, floor=3), Ratio(0.5, min_tokens=3)),
        (lambda: Count(tokens=3, ceiling=0.5), Count(3, max_ratio=0.5)),
        (lambda: Uniform(share=0.3, multiple=2), Uniform(0.3, multiple=2)),
        (lambda: PerLayer(layer_shares=(0.5,)), PerLayer((0.5,))),
        (lambda: policy.Griffin(), GriffinScore()),
    ],
)
def test_old_names_of_scores_budgets_and_schedules(make, now):
    with pytest.warns((OldNameWarning, DeprecationWarning)):
        assert make() == now


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv:keep=0.2,keep_ratio=0.3", "are the same parameter: give keep_ratio alone"),
        ("corematching:keep=0.2,keep_ratio=0.3", "keep is an old name, keep_ratio a new one"),
        ("corematching:firing=0.2,neurons=none", "firing is an old name, neurons a new one"),
        ("pyramiddrop:keep=[0.5,7,3]", "mixes ratios and counts"),
        ("corematching:keep=1.5", "keep_ratio=1.5: give a ratio"),
        ("corematching:firing=0", "active_ratio=0: give a ratio"),
    ],
)
def test_wrong_old_text_is_refused_in_present_names(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(text)


@pytest.mark.filterwarnings("ignore::corematching.old_names.OldNameWarning")
@pytest.mark.parametrize(
    "path", sorted(DOCS.glob("*/board.json")), ids=lambda path: path.parent.name
)
def test_boards_of_the_docs_can_be_read(path):
    board = json.loads(path.read_text(encoding="utf-8"))
    for entry in board["methods"]:
        method_from_text(entry["method"])
    families = list(board["methods"][0]["families"])
    assert board["methods"][-1]["method"] in render(board, families)
    for axis in AXES:
        for name in group_curves(board["methods"][1:], axis):
            assert "keep=" not in name or axis == "neurons_kept"
