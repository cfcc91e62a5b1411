"""Draw the README's picture: the published score, our score, and what is kept.

    python examples/lead_picture.py docs/images/what-is-kept.png

The scores are those of the layer after which each rule drops image tokens, on the picture and the
question that the package ships.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from corematching import CoreMatching, load_demo
from corematching.cli.overlay import draw_patches
from corematching.demo.example import read_example
from corematching.lab.analyze import analyze_picture, default_rules
from corematching.lab.analyze.heat import COLOURS
from corematching.lab.evaluate import Subject

DOTS_PER_INCH = 150


def measure(subject: Subject, picture: Image.Image, question: str) -> tuple[list[Any], np.ndarray]:
    """The scores of both rules as ``(title, grid)``, and the mask of what is kept."""
    rules = default_rules()
    depth = subject.model.config.text_config.num_hidden_layers
    cuts = [rule.method.tokens.drop_after(depth)[0] for rule in rules]
    analysis = analyze_picture(subject, picture, question, rules, layers=sorted(set(cuts)))
    layers = {findings.layer: findings for findings in analysis.layers}
    titles = ("The published score", "Our score")
    scores = [
        (title, layers[cut].rules[rule.name].scores.reshape(analysis.grid))
        for title, cut, rule in zip(titles, cuts, rules, strict=True)
    ]
    with CoreMatching()(subject.model) as run:
        subject.model.generate(**subject.encode([question], [picture]), max_new_tokens=1)
    return scores, np.array(run.report.samples[0].keep_mask).reshape(analysis.grid)


def draw(path: Path, picture: Image.Image, scores: list[Any], kept: np.ndarray) -> None:
    """Write the three panels into a PNG file."""
    figure = Figure(figsize=(10.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, (title, values) in zip(axes, scores, strict=False):
        axis.imshow(values, cmap=COLOURS)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=17)
    draw_patches(axes[-1], picture, kept)
    axes[-1].set_aspect("equal")
    axes[-1].set_title(f"Kept: {kept.sum()} of {kept.size} tokens", fontsize=17)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "what-is-kept.png")
    example = read_example()
    picture = Image.open(example.image).convert("RGB")
    subject = Subject("SceneVLM", *load_demo())
    draw(path, picture, *measure(subject, picture, example.question))


if __name__ == "__main__":
    main()
