"""Draw the learning curves from the training logs, round after round.

python curves.py --vision logs/vision-*.jsonl --tune logs/tune-*.jsonl --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from questions import FAMILIES


def read_logs(paths: list[Path], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity; a later round's steps go on behind the earlier's."""
    steps, values, done = [], [], 0
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if "step" in row]
        steps += [done + row["step"] for row in rows if key in row]
        values += [row[key] for row in rows if key in row]
        done += max(row["step"] for row in rows)
    return steps, values


def last_steps(paths: list[Path]) -> list[float]:
    """Where each round but the last ends."""
    ends = [max(read_logs([path], "step")[0]) for path in paths]
    return [sum(ends[: i + 1]) for i in range(len(ends) - 1)]


def draw(vision: list[Path], tune: list[Path], out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for key, label in (
        ("object_accuracy", "object patches"),
        ("word_accuracy", "sign patches"),
        ("background_accuracy", "background patches"),
    ):
        axes[0].plot(*read_logs(vision, key), label=label)
    axes[0].set(title="Stage 1: naming patches (training scenes)", ylabel="accuracy")
    axes[1].plot(*read_logs(tune, "loss"), color="tab:gray", label="loss")
    axes[1].plot(*read_logs(tune, "token_accuracy"), label="answer tokens right")
    axes[1].set(title="Stage 3: answering (training scenes)")
    for family in FAMILIES:
        axes[2].plot(*read_logs(tune, family), label=family, linewidth=1)
    axes[2].plot(*read_logs(tune, "all"), label="all", color="black", linewidth=2)
    axes[2].set(title="Stage 3: whole answers right (development scenes)")
    for axis, logs in zip(axes, (vision, tune, tune), strict=True):
        for end in last_steps(logs):
            axis.axvline(end, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel("step (dotted: the next round begins)")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    axes[1].legend()
    axes[0].legend()
    axes[2].legend(fontsize=7, ncol=2)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, nargs="+", required=True)
    parser.add_argument("--tune", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args.vision, args.tune, args.out)
