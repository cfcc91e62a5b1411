"""Draw the learning curves from the training logs, round after round.

python curves.py --vision logs/vision-*.jsonl --tune logs/tune-*.jsonl \
    --sharpen logs/sharpen-*.jsonl --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from questions import FAMILIES


def read_rounds(paths: list[Path]) -> tuple[list[dict[str, float]], list[float]]:
    """The rows of all logs, scenes counted on, and after how many scenes each later one starts."""
    rows, starts, seen = [], [], 0
    for path in paths:
        starts.append(seen)
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "scenes" in row:
                row["scenes"] += starts[-1]
                seen = row["scenes"]
            rows.append(row)
    return rows, starts[1:]


def read_curve(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Thousands of scenes seen, and one quantity."""
    rows = [row for row in rows if key in row and "scenes" in row]
    return [row["scenes"] / 1000 for row in rows], [row[key] for row in rows]


def draw(
    vision_logs: list[Path], tune_logs: list[Path], sharpen_logs: list[Path], out: Path
) -> None:
    vision, vision_starts = read_rounds(vision_logs)
    tune, tune_starts = read_rounds(tune_logs)
    sharpen, sharpen_starts = read_rounds(sharpen_logs)
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    axes = axes.ravel()
    for key, label in (
        ("object_accuracy", "object patches"),
        ("word_accuracy", "sign patches"),
        ("background_accuracy", "background patches"),
    ):
        axes[0].plot(*read_curve(vision, key), label=label)
    axes[0].set(title="Stage 1: naming patches (training scenes)", ylabel="accuracy")
    axes[1].plot(*read_curve(tune, "loss"), color="tab:gray", label="loss, nats per token")
    axes[1].plot(*read_curve(tune, "token_accuracy"), label="answer tokens right")
    axes[1].set(title="Stage 3: answering (training scenes)")
    for key, label in (
        ("name_loss", "names, nats"),
        ("place_loss", "places, of a thing's size"),
        ("centre_loss", "centres, nats"),
    ):
        axes[2].plot(*read_curve(sharpen, key), label=label)
    axes[2].set(title="Round 3: frozen heads' losses (hard scenes)")
    all_starts = vision_starts, tune_starts, sharpen_starts
    for axis, starts in zip(axes[:3], all_starts, strict=True):
        for start in starts:
            axis.axvline(start / 1000, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("thousand scenes")
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
        axis.legend()
    last = next(row for row in reversed(tune) if "all" in row)
    families = sorted(FAMILIES, key=lambda family: last[family])
    bars = axes[3].barh(families, [last[family] for family in families])
    axes[3].bar_label(bars, fmt="%.2f", padding=3)
    axes[3].set(title=f"Answers right after round 2 (held-out scenes): {last['all']:.2f}")
    axes[3].set_xlim(0, 1.1)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vision", type=Path, nargs="+", required=True)
    parser.add_argument("--tune", type=Path, nargs="+", required=True)
    parser.add_argument("--sharpen", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args.vision, args.tune, args.sharpen, args.out)
