"""The shipped example: a picture and a question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from corematching.demo.assets import REINSTALL
from corematching.errors import InputError

EXAMPLE_NAME = "example.json"


@dataclass(frozen=True)
class Example:
    """A picture file, a question about it, and the right answer."""

    image: Path
    question: str
    answer: str


def read_example(directory: Path | str | None = None) -> Example:
    """Read ``example.json``: ``{"image": "<path from here>", "question": "...", "answer": "..."}``.

    Raises
    ------
    InputError
        The file is missing or damaged.
    """
    folder = Path(directory) if directory else Path(__file__).parent / "data"
    try:
        values = json.loads((folder / EXAMPLE_NAME).read_text(encoding="utf-8"))
        return Example(folder / values["image"], values["question"], values["answer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the shipped example {folder / EXAMPLE_NAME} cannot be read: {REINSTALL}"
        ) from error
