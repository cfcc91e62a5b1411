"""The study over a task, on a tiny model."""

from __future__ import annotations

import json

import pytest

from corematching import CoreMatching, TopNeurons
from corematching.analyze import Rule, StudyPlan, build_study_page, study_task, write_tables
from corematching.analyze.study import average_layers, summarise
from corematching.evaluate.measure import Bootstrap
from tests.analyze.pages import check_page

RULES = (
    Rule.of("paper", "Paper", CoreMatching.paper(layer=1)),
    Rule.of("ours", "Our default", CoreMatching(layer=1, neurons=TopNeurons())),
)


@pytest.fixture(scope="module")
def study(subject, split):
    from corematching.evaluate import SceneQA

    steps = []
    plan = StudyPlan(limit=5, seed=3)
    found = study_task(subject, SceneQA.load(split), RULES, plan, lambda *step: steps.append(step))
    assert steps == [(done, 5) for done in range(1, 6)]
    return found


def test_every_figure_has_its_interval(study, subject):
    depth = subject.model.config.text_config.num_hidden_layers
    assert [layer["layer"] for layer in study["layers"]] == list(range(depth))
    for table in (study["mean"], *(layer["rules"] for layer in study["layers"])):
        assert list(table) == ["paper", "ours"]
        for figures in table.values():
            for figure in filter(None, figures.values()):
                assert -1 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
            core, other = figures["neurons_from_core"], figures["neurons_from_random"]
            gain = figures["neurons_gain"]["value"]
            assert gain == pytest.approx(core["value"] - other["value"])
    assert study["settings"]["questions"] == 5 and study["settings"]["seed"] == 3
    json.dumps(study, allow_nan=False)


def test_same_seed_same_result(study, subject, task):
    again = study_task(subject, task, RULES, StudyPlan(limit=5, seed=3))
    assert again == study
    few = study_task(subject, task, RULES, StudyPlan(limit=5, seed=3, layers=[1]))
    assert few["layers"] == [study["layers"][1]]
    other = study_task(subject, task, RULES, StudyPlan(limit=5, seed=4, layers=[1]))
    assert other["layers"] != few["layers"]


def test_means_leave_out_what_is_undefined():
    layers = {
        0: {"r": {"x": 1.0, "y": None, "z": None}},
        1: {"r": {"x": 0.0, "y": 0.4, "z": None}},
    }
    assert average_layers(layers) == {"r": {"x": 0.5, "y": 0.4, "z": None}}
    rows = [{"r": {"y": 0.4, "z": None}}, {"r": {"y": None, "z": None}}]
    told = summarise(rows, Bootstrap(["a", "b"], seed=0))
    assert told["r"]["y"] == {"value": 0.4, "low": 0.4, "high": 0.4} and told["r"]["z"] is None


def test_page_and_tables(study):
    page = build_study_page(study, "corematching analyze-task --limit=5")
    check_page(page)
    assert page.count("<svg") == 6 and "analyze-task --limit=5" in page
    tables = write_tables(study, "corematching analyze-task --limit=5")
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 * (2 + 1 + len(study["layers"]))
    assert len({line.count("|") for line in rows[: 3 + len(study["layers"])]}) == 1
    value = study["mean"]["paper"]["tokens_kept"]["value"]
    assert f"{100 * value:.1f}" in rows[2]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.03, "ahead of random"), (-0.03, -0.01, "behind random"), (-0.01, 0.03, "No diff")],
)
def test_the_summary_says_what_came_out(study, low, high, words):
    for table in (study["mean"]["paper"], study["mean"]["ours"]):
        for gain in ("neurons_gain", "tokens_gain"):
            table[gain] = {"value": (low + high) / 2, "low": low, "high": high}
    assert build_study_page(study).count(words) == 4
