"""Draw the learning curves from the two training logs.

python curves.py --vision runs/vision/log.jsonl --tune runs/tune/log.jsonl --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from questions import FAMILIES


def read_log(path: Path, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if key in row and "step" in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def draw(vision: Path, tune: Path, out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for key, label in (
        ("object_accuracy", "object patches"),
        ("background_accuracy", "background patches"),
    ):
        axes[0].plot(*read_log(vision, key), label=label)
    axes[0].set(title="Stage 1: naming patches (training scenes)", ylabel="accuracy")
    axes[1].plot(*read_log(tune, "loss"), color="tab:gray", label="loss")
    axes[1].plot(*read_log(tune, "token_accuracy"), label="answer tokens right")
    axes[1].set(title="Stage 3: answering (training scenes)")
    for family in FAMILIES:
        axes[2].plot(*read_log(tune, family), label=family, linewidth=1)
    axes[2].plot(*read_log(tune, "all"), label="all", color="black", linewidth=2)
    axes[2].set(title="Stage 3: whole answers right (development scenes)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    axes[1].legend()
    axes[0].legend()
    axes[2].legend(fontsize=7, ncol=2)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--tune", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args.vision, args.tune, args.out)
