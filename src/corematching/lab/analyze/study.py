"""Do core tokens and core neurons reinforce each other? Measured over the questions of a task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from corematching.lab.analyze.layer import CRITERIA, measure_influence
from corematching.lab.analyze.rank import correlate_ranks
from corematching.lab.analyze.recovery import recover
from corematching.lab.analyze.rules import Rule
from corematching.lab.analyze.watch import watch_layers
from corematching.lab.evaluate import Subject, Task, pick_questions
from corematching.lab.evaluate.answer import read_picture
from corematching.lab.evaluate.measure import Bootstrap
from corematching.protocol import PrefillView

GAINS = {
    "neurons_gain": ("neurons_from_core", "neurons_from_random"),
    "tokens_gain": ("tokens_from_core", "tokens_from_random"),
}
Progress = Callable[[int, int], None]
Row = dict[str, float | None]
Layers = dict[int, dict[str, Row]]
"""Layer -> rule -> figure -> value."""


@dataclass(frozen=True)
class StudyPlan:
    """The questions and layers of a study.

    Attributes
    ----------
    limit : int or None
        Size of the random sample of questions; None asks all.
    seed : int
        Of the sample, of the random tokens and neurons, and of the intervals.
    layers : collection of int or None
        Default: all.
    """

    limit: int | None = 100
    seed: int = 0
    layers: Collection[int] | None = None


def study_task(
    subject: Subject,
    task: Task[Any],
    rules: Sequence[Rule],
    plan: StudyPlan,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every layer on every question, one question at a time.

    Parameters
    ----------
    subject : Subject
        The model under study.
    task : Task
        The source of the questions.
    rules : sequence of Rule
    plan : StudyPlan
    progress : callable
        Gets the questions done and those there are, after each.

    Returns
    -------
    dict
        ``settings``; ``rules``; ``layers``, a list with, for each rule, the mean over the questions
        and its 95 % bootstrap interval over pictures (``value``, ``low``, ``high``) of the figures
        of `corematching.lab.analyze.recovery.Recovery`, of what core is ahead of random by, and of
        the rank correlations of the token score with `CRITERIA`; and ``mean``, the same
        of each question's mean over the layers. A figure that no question defines is None.

    Raises
    ------
    ConfigError
        The limit, the seed or a layer is out of range.
    """
    questions = pick_questions(task, plan.limit, plan.seed)
    rows = []
    for done, question in enumerate(questions, 1):
        rows.append(study_question(subject, task, question, rules, plan))
        progress(done, len(questions))
    bootstrap = Bootstrap([str(question.image) for question in questions], plan.seed)
    layers = sorted(rows[0])
    return {
        "settings": {
            "model": subject.name,
            "weights": subject.digest,
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "task": task.name,
            "questions": len(questions),
            "seed": plan.seed,
            "num_layers": subject.model.config.get_text_config(decoder=True).num_hidden_layers,
        },
        "rules": [rule.to_dict() for rule in rules],
        "layers": [
            {"layer": layer, "rules": summarise([row[layer] for row in rows], bootstrap)}
            for layer in layers
        ],
        "mean": summarise([average_layers(row) for row in rows], bootstrap),
    }


def study_question(
    subject: Subject, task: Task[Any], question: Any, rules: Sequence[Rule], plan: StudyPlan
) -> Layers:
    """Every figure of one question."""
    inputs = subject.encode([task.prompt(question)], [read_picture(question.image)])
    findings: Layers = {}

    def look(view: PrefillView) -> None:
        influence = measure_influence(view)
        of_image = view.image[0]
        findings[view.layer] = {}
        for rule in rules:
            scores = rule.token_score(view)
            seed = (plan.seed, question.id, view.layer)
            figures: Row = asdict(recover(view, rule, scores, _make_generator(*seed)))
            for gain, (core, other) in GAINS.items():
                figures[gain] = _subtract(figures[core], figures[other])
            values = scores[0, of_image].double().cpu().numpy()
            for name in CRITERIA:
                figures[name] = correlate_ranks(values, influence[name])
            findings[view.layer][rule.name] = figures

    watch_layers(subject.model, inputs, look, plan.layers)
    return findings


def average_layers(layers: Layers) -> dict[str, Row]:
    """Rule -> figure -> its mean over the layers that define it."""
    first = next(iter(layers.values()))
    averaged: dict[str, Row] = {}
    for rule, figures in first.items():
        columns = {name: [layers[layer][rule][name] for layer in layers] for name in figures}
        averaged[rule] = {name: _mean(column) for name, column in columns.items()}
    return averaged


def summarise(rows: Sequence[dict[str, Row]], bootstrap: Bootstrap) -> dict[str, Any]:
    """Rule -> figure -> mean over the questions with its interval, or None."""
    return {
        rule: {
            name: _measure([row[rule][name] for row in rows], bootstrap) for name in rows[0][rule]
        }
        for rule in rows[0]
    }


def _measure(values: Sequence[float | None], bootstrap: Bootstrap) -> dict[str, float] | None:
    defined = [float(value is not None) for value in values]
    interval = bootstrap.ratio([value or 0.0 for value in values], defined)
    return None if interval is None else interval.to_dict()


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _subtract(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _make_generator(*seeds: int) -> torch.Generator:
    """A separate generator for each question and layer, independent of earlier runs."""
    state = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)
