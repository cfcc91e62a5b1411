"""One picture and one question, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from PIL import Image

from corematching.errors import InputError
from corematching.lab.analyze.heat import Grid
from corematching.lab.analyze.layer import LayerFindings, examine_layer
from corematching.lab.analyze.rules import Rule
from corematching.lab.analyze.watch import watch_layers
from corematching.lab.evaluate import Subject
from corematching.protocol import PrefillView


@dataclass
class PictureAnalysis:
    """The findings of every layer about one picture and question.

    Attributes
    ----------
    model : str
    question : str
    rules : tuple of Rule
    picture : Image
        What the patches cover.
    grid : (int, int) or None
        Rows and columns of patches; None where the image tokens form no single grid.
    num_layers, image_tokens, text_tokens : int
        Of the model, and of the prompt.
    layers : list of LayerFindings
        Ascending.
    answers : dict
        The answers, by the name of the method.
    """

    model: str
    question: str
    rules: tuple[Rule, ...]
    picture: Image.Image
    grid: Grid | None
    num_layers: int
    image_tokens: int
    text_tokens: int
    layers: list[LayerFindings]
    answers: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        names = ("model", "question", "answers", "num_layers", "image_tokens", "text_tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "grid": None if self.grid is None else list(self.grid),
            "rules": [rule.to_dict() for rule in self.rules],
            "layers": [findings.to_dict() for findings in self.layers],
        }

    def cuts_of(self, rule: Rule) -> tuple[int, ...]:
        """The layers after which the rule's method drops tokens."""
        tokens: Any = rule.method.tokens
        return tuple(tokens.drop_after(self.num_layers))


def analyze_picture(
    subject: Subject,
    picture: Image.Image,
    question: str,
    rules: Sequence[Rule],
    layers: Collection[int] | None = None,
    square: bool = True,
    progress: Callable[[int], None] = lambda layer: None,
) -> PictureAnalysis:
    """Run the prompt once, with nothing dropped, and measure its layers.

    Parameters
    ----------
    subject : Subject
        The model.
    picture : Image
    question : str
    rules : sequence of Rule
    layers : collection of int, optional
        Default: all.
    square : bool
        Whether the model turns the whole picture into one square of tokens, row by row, unless its
        processor says otherwise.
    progress : callable
        Called with each layer when it is done.

    Raises
    ------
    InputError
        The question is empty, or the model sees no picture.
    ConfigError
        A layer does not exist.
    UnsupportedModelError
        The model's layers cannot be watched.
    """
    if not question.strip():
        raise InputError("the question is empty: ask something with --question")
    inputs = subject.encode([question], [picture])
    found: list[LayerFindings] = []
    counts: dict[str, int] = {}

    def look(view: PrefillView) -> None:
        counts.update(image=int(view.image.sum()), text=int(view.text.sum()))
        counts.update(layers=view.num_layers)
        found.append(examine_layer(view, rules))
        progress(view.layer)

    watch_layers(subject.model, inputs, look, layers)
    return PictureAnalysis(
        model=subject.name,
        question=question,
        rules=tuple(rules),
        picture=picture,
        grid=find_grid(inputs, subject.processor, counts["image"], square),
        num_layers=counts["layers"],
        image_tokens=counts["image"],
        text_tokens=counts["text"],
        layers=found,
    )


def find_grid(
    inputs: Mapping[str, Any], processor: Any, tokens: int, square: bool = True
) -> Grid | None:
    """The grid of one picture's tokens: the processor's, else a square, else None.

    Parameters
    ----------
    inputs : mapping
        The processor's output; ``image_grid_thw`` is read if present.
    processor : ProcessorMixin
        ``merge_size`` of its image processor says how many patches a token's side has.
    tokens : int
        Image tokens of the prompt.
    square : bool
        Whether they form a square otherwise.
    """
    if (sizes := inputs.get("image_grid_thw")) is not None:
        merge = getattr(processor.image_processor, "merge_size", 1)
        _, rows, columns = (int(size) for size in sizes[0])
        grid = (rows // merge, columns // merge)
        return grid if grid[0] * grid[1] == tokens else None
    side = isqrt(tokens)
    return (side, side) if square and side * side == tokens else None
