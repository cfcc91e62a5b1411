"""The study behind `CoreMatching()`'s defaults: scores, layers, budgets and neurons on SceneVLM.

    python benchmarks/choose_defaults.py tokens  --split training/runs/develop --out runs/tokens
    python benchmarks/choose_defaults.py neurons --split training/runs/develop --out runs/neurons

The split is the development split that ``training/make_split.py`` draws, never the test split.
Running it again goes on where it stopped; ``board.md`` in ``--out`` holds the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from corematching import CoreMatching, CoreOverlap, TextOverlap, TopNeurons, load_demo
from corematching.evaluate import Plan, SceneQA, Subject, evaluate
from corematching.methods import BaseMethod

ONCE: dict[str, Any] = {"layer": 0.5, "cover": 0.5, "proportional": False, "neurons": None}
"""What the study held fixed, whatever the defaults are now."""


def list_token_methods() -> dict[str, BaseMethod]:
    """Token scores and layers at one budget, all neurons."""
    scores = {
        "paper's score": CoreOverlap(top_ratio=0.2, core_ratio=0.4),
        "question, no rarity": TextOverlap(rarity=0.0),
        "question, rarity": TextOverlap(rarity=1.0),
        "attention": "attention",
        "random": "random",
    }
    methods = {
        f"{name}, 25 %": CoreMatching(**ONCE, score=score, keep_ratio=0.25)
        for name, score in scores.items()
    }
    for layer in (2, 9):
        methods[f"question, rarity, 25 %, after layer {layer}"] = CoreMatching(
            **(ONCE | {"layer": layer}), keep_ratio=0.25
        )
    methods["question, rarity, 15 %"] = CoreMatching(**ONCE, keep_ratio=0.15)
    return methods


def list_neuron_methods() -> dict[str, BaseMethod]:
    """Neuron scores and ratios, all tokens."""
    methods: dict[str, BaseMethod] = {}
    for ratio in (0.4, 0.6):
        for score in ("paper", "griffin"):
            methods[f"{score}, {ratio:.0%} of the middle layers"] = keep_neurons(ratio, score=score)
    methods["griffin, 40 %, no compensation"] = keep_neurons(0.4, compensate=False)
    methods["griffin, 40 % of every layer"] = keep_neurons(0.4, dense_first=0, dense_last=0)
    return methods


def keep_neurons(ratio: float, **changes: Any) -> CoreMatching:
    """All tokens, and neurons chosen for the whole answer."""
    return CoreMatching(score=None, neurons=TopNeurons(ratio, **changes))


STUDIES = {"tokens": list_token_methods, "neurons": list_neuron_methods}


def run_study(args: argparse.Namespace) -> None:
    model, processor = load_demo()
    subject = Subject("SceneVLM", model, processor)
    task = SceneQA.load(args.split)
    plan = Plan(limit=args.limit, batch=args.batch)
    command = f"python benchmarks/choose_defaults.py {args.study} --limit {args.limit}"
    board = evaluate(subject, task, STUDIES[args.study](), args.out, plan, command=command)
    for entry in board["methods"]:
        accuracy, tokens = entry["accuracy"]["value"], entry["tokens_kept"]["mean"]
        print(f"{accuracy:6.1%}  {tokens:6.1%} tokens  {entry['neurons_kept']:6.1%} neurons  "
              f"{entry['method']}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="questions")
    parser.add_argument("--batch", type=int, default=8)
    run_study(parser.parse_args())
