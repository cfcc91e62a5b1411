"""The board: kept ratios and losses of every method of a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from corematching.lab.evaluate.measure import Bootstrap
from corematching.lab.evaluate.plot import draw_curves
from corematching.lab.evaluate.store import Answer, RunDirectory, write_whole
from corematching.lab.evaluate.task import Question, Task

MEANS = (
    "prefill_flops",
    "dense_prefill_flops",
    "decode_flops",
    "dense_decode_flops",
    "kv_bytes",
    "dense_kv_bytes",
    "vision_seconds",
    "prefill_seconds",
    "decode_seconds",
    "new_tokens",
)
PICTURES = {"tokens.png": "tokens_kept", "neurons.png": "neurons_kept"}


def make_board(
    run: RunDirectory, task: Task[Any], questions: Sequence[Question], command: str = ""
) -> dict[str, Any]:
    """Write ``board.json``, ``board.md`` and the two pictures into the run directory.

    Parameters
    ----------
    run : RunDirectory
    task : Task
    questions : sequence of Question
        Those of the run.
    command : str
        The command of the run, without its methods.

    Returns
    -------
    dict
        ``command``; ``settings``; ``methods``, a list with dense first. Each method has ``method``
        (the text that names it), ``parameters``, ``accuracy``, ``of_dense`` (its ratio to the dense
        accuracy, None where that is 0) and ``families``, with intervals; ``agreement`` with the
        dense answers, ``kl``, ``tokens_kept`` (mean, p5, p95), ``layer_tokens`` (the ratio that a
        layer computes, averaged over the layers; None where it was not counted),
        ``neurons_kept``, ``batches`` and the means per question of FLOPs, KV bytes, seconds and
        tokens.
    """
    entries: list[dict[str, Any]] = []
    judge: Judge | None = None
    for text, parameters in run.methods.items():
        answers = run.answers(text).read()
        if not all(question.id in answers for question in questions):
            continue
        ordered = [answers[question.id] for question in questions]
        judge = judge or Judge(task, questions, ordered, run.settings["seed"])
        entries.append({"method": text, "parameters": parameters} | judge.measure(ordered))
    named = [word for entry in entries[1:] for word in ("--method", entry["method"])]
    command = f"{command} {shlex.join(named)}".strip()
    board = {"command": command, "settings": run.settings, "methods": entries}
    write_whole(run.path / "board.json", json.dumps(board, indent=2, allow_nan=False) + "\n")
    write_whole(run.path / "board.md", render(board, task.families))
    for name, axis in PICTURES.items():
        draw_curves(entries, axis, run.path / name, run.settings["model"])
    return board


class Judge:
    """Measures answers beside the dense ones.

    Parameters
    ----------
    task : Task
    questions : sequence of Question
    dense : sequence of Answer
        In the order of the questions.
    seed : int
        Of the intervals.
    """

    def __init__(
        self, task: Task[Any], questions: Sequence[Question], dense: Sequence[Answer], seed: int
    ) -> None:
        self.task, self.questions, self.dense, self.seed = task, questions, dense, seed
        self._bootstraps: dict[tuple[int, ...], Bootstrap] = {}

    def measure(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Every figure of one method; ``answers`` in the order of the questions."""
        right = [float(answer.correct) for answer in answers]
        dense_right = [float(answer.correct) for answer in self.dense]
        bootstrap = self._bootstrap(tuple(range(len(answers))))
        of_dense = bootstrap.ratio(right, dense_right)
        agreements = [
            self.task.agree(question, answer.text, other.text)
            for question, answer, other in zip(self.questions, answers, self.dense, strict=True)
        ]
        kept = [answer.tokens_kept for answer in answers]
        low, high = np.percentile(kept, [5, 95])
        by_layer = [a.layer_tokens for a in answers if a.layer_tokens is not None]
        return {
            "questions": len(answers),
            "accuracy": bootstrap.mean(right).to_dict(),
            "of_dense": None if of_dense is None else of_dense.to_dict(),
            "families": {family: self._family(family, right) for family in self.task.families},
            "agreement": float(np.mean(agreements)),
            "kl": float(np.mean([answer.kl for answer in answers])),
            "tokens_kept": {"mean": float(np.mean(kept)), "p5": float(low), "p95": float(high)},
            "layer_tokens": float(np.mean(by_layer)) if len(by_layer) == len(kept) else None,
            "neurons_kept": float(np.mean([answer.neurons_kept for answer in answers])),
            "batches": sorted({answer.batch for answer in answers}),
            **{name: float(np.mean([getattr(a, name) for a in answers])) for name in MEANS},
        }

    def _family(self, family: str, right: Sequence[float]) -> dict[str, Any] | None:
        """Accuracy within a family; None where the sample has no question of it."""
        rows = tuple(i for i, question in enumerate(self.questions) if question.family == family)
        if not rows:
            return None
        accuracy = self._bootstrap(rows).mean([right[i] for i in rows])
        return accuracy.to_dict() | {"questions": len(rows)}

    def _bootstrap(self, rows: tuple[int, ...]) -> Bootstrap:
        if rows not in self._bootstraps:
            pictures = [str(self.questions[i].image) for i in rows]
            self._bootstraps[rows] = Bootstrap(pictures, self.seed)
        return self._bootstraps[rows]


def render(board: dict[str, Any], families: Sequence[str]) -> str:
    """The board as Markdown."""
    settings, entries = board["settings"], board["methods"]
    facts = [
        f"- model: {settings['model']} (weights {settings['weights']}), {settings['dtype']}, "
        f"{settings['attention']} attention, on {settings['device']}",
        f"- task: {settings['task']}, {settings['questions']} questions, seed {settings['seed']}, "
        f"answers of at most {settings['max_new_tokens']} tokens, greedy",
        f"- machine: {settings['machine']}",
        f"- versions: corematching {settings['corematching']}, torch {settings['torch']}",
    ]
    parts = [
        "# What is kept, and what is lost",
        f"```\n{board['command']}\n```",
        "\n".join(facts),
        _fidelity_table(entries),
        _cost_table(entries),
        _family_table(entries, families),
        NOTES,
        "![accuracy over image tokens](tokens.png)\n![accuracy over neurons](neurons.png)\n",
    ]
    return "\n\n".join(parts)


NOTES = """Intervals are 95 % bootstrap intervals over pictures. "Same" is the ratio of answers that
match the dense one after normalisation; KL is that of the answer's first token, dense from sparse,
in nats, over the dense model's likeliest words with the rest as one; neurons are thinned out from
the second token on, so a method that drops no image tokens has none. Tokens are the image tokens
that reach the last layer, "by layer" those that a layer computes, averaged over the layers; neurons
are those that a decode step computes (with per-token thresholds, the ratio of the FFN that they are
calibrated for). FLOPs, bytes and seconds are means per question; seconds are those of a batch
divided by its size, and missing ("-") where methods shared their prompts."""


def _fidelity_table(entries: Sequence[dict[str, Any]]) -> str:
    head = (
        "method",
        "accuracy",
        "of dense",
        "same",
        "KL",
        "tokens (5-95 %)",
        "by layer",
        "neurons",
    )
    rows = []
    for entry in entries:
        tokens, of_dense = entry["tokens_kept"], entry["of_dense"]
        by_layer = entry.get("layer_tokens")
        spread = f"{_percent(tokens['mean'])} ({_percent(tokens['p5'])}-{_percent(tokens['p95'])})"
        rows.append(
            (
                f"`{entry['method']}`",
                _interval(entry["accuracy"]),
                "-" if of_dense is None else _interval(of_dense),
                _percent(entry["agreement"]),
                f"{entry['kl']:.3f}",
                spread,
                "-" if by_layer is None else _percent(by_layer),
                _percent(entry["neurons_kept"]),
            )
        )
    return _table(head, rows)


def _cost_table(entries: Sequence[dict[str, Any]]) -> str:
    head = (
        "method",
        "prefill GFLOPs",
        "decode step MFLOPs",
        "KV KiB",
        "vision ms",
        "prefill ms",
        "decode ms",
        "new tokens",
    )
    rows = [
        (
            f"`{entry['method']}`",
            _against(entry, "prefill_flops", 1e9),
            _against(entry, "decode_flops", 1e6),
            _against(entry, "kv_bytes", 1024),
            *(_milliseconds(entry[f"{part}_seconds"]) for part in ("vision", "prefill", "decode")),
            f"{entry['new_tokens']:.1f}",
        )
        for entry in entries
    ]
    return _table(head, rows)


def _family_table(entries: Sequence[dict[str, Any]], families: Sequence[str]) -> str:
    asked = [family for family in families if entries and entries[0]["families"][family]]
    rows = [
        (f"`{entry['method']}`", *(_interval(entry["families"][family]) for family in asked))
        for entry in entries
    ]
    return _table(("method", *asked), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds else "-"


def _interval(figure: dict[str, Any]) -> str:
    low, high = _percent(figure["low"]), _percent(figure["high"])
    return f"{_percent(figure['value'])} ({low}-{high})"


def _against(entry: dict[str, Any], name: str, unit: float) -> str:
    sparse, dense = entry[name] / unit, entry[f"dense_{name}"] / unit
    return f"{sparse:.3g} of {dense:.3g}"
