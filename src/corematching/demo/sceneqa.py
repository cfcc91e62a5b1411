"""SceneQA: the shipped test split of 400 pictures and 2,000 questions, and its scorer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from corematching.errors import InputError, first_line

FAMILIES = (
    "exists",
    "count",
    "side",
    "relation",
    "bigger",
    "where",
    "list",
    "read",
    "choice",
    "describe",
)
SCENE = {"image": str, "items": list}
ITEM = {"name": str, "word": bool, "box": list}
QUESTION = {
    "id": int,
    "image": str,
    "family": str,
    "question": str,
    "answer": str,
    "new_wording": bool,
}
_DIRECTORY = Path(__file__).parent / "data" / "sceneqa"
_LISTS = frozenset({"list", "describe"})
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class Box:
    """One object or sign in a picture; the box is (left, top, width, height) in pixels."""

    name: str
    is_word: bool
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about one picture.

    Attributes
    ----------
    id : int
        Its index in the split.
    image : Path
        A 224 x 224 picture.
    family : str
        One of `FAMILIES`.
    question, answer : str
        The text asked and the reference answer.
    new_wording : bool
        Whether the wording is absent from training.
    items : tuple of Box
        The picture's objects, for oracles.
    """

    id: int
    image: Path
    family: str
    question: str
    answer: str
    new_wording: bool
    items: tuple[Box, ...]

    def is_correct(self, answer: str) -> bool:
        """Whether ``answer`` matches exactly; see `is_correct`."""
        return is_correct(self.family, answer, self.answer)


def load_sceneqa(directory: Path | str | None = None) -> list[SceneQuestion]:
    """Load a split of SceneQA.

    Parameters
    ----------
    directory : Path or str, optional
        A folder with ``questions.jsonl``, ``scenes.jsonl`` and ``images/``. Default: the shipped
        test split.

    Raises
    ------
    InputError
        If the folder is not a split of SceneQA, or a line of its files is damaged (it is named).
    """
    root = Path(directory) if directory else _DIRECTORY
    for name in ("questions.jsonl", "scenes.jsonl"):
        if not (root / name).is_file():
            raise InputError(f"no {name} in {root}: pass the folder of a SceneQA split")
    scenes: dict[str, tuple[Box, ...]] = {}
    for row in _read_rows(root / "scenes.jsonl", SCENE):
        scenes[row["image"]] = _read_boxes(root, row)
    questions: dict[int, SceneQuestion] = {}
    for row in _read_rows(root / "questions.jsonl", QUESTION):
        if row["id"] in questions or row["image"] not in scenes:
            fault = "comes twice" if row["id"] in questions else f"has no scene {row['image']}"
            raise InputError(f"question {row['id']} of {root} {fault}: the split is damaged")
        shown = scenes[row["image"]]
        named = {name: row[name] for name in ("id", "family", "question", "answer", "new_wording")}
        questions[row["id"]] = SceneQuestion(image=root / row["image"], items=shown, **named)
    if not questions:
        raise InputError(f"no question in {root}: pass the folder of a SceneQA split")
    return list(questions.values())


def is_correct(family: str, answer: str, reference: str) -> bool:
    """Exact match after normalisation.

    Case, punctuation and articles do not count; in the families "list" and "describe" neither does
    the order in which things are named.
    """
    if family in _LISTS:
        return _split_parts(answer) == _split_parts(reference)
    return _normalise(answer) == _normalise(reference)


@cache
def _normalise(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


@cache
def _split_parts(text: str) -> tuple[str, ...]:
    text = re.sub(r"^\s*a picture of\b", "", text.lower().strip().rstrip("."))
    parts = re.split(r",|\band\b|\bwith the word\b", text)
    return tuple(sorted(part for part in map(_normalise, parts) if part))


def _read_boxes(root: Path, row: dict[str, Any]) -> tuple[Box, ...]:
    try:
        items = [_check_row(item, ITEM) for item in row["items"]]
        boxes = [Box(item["name"], item["word"], tuple(item["box"])) for item in items]
        if not all(len(box.box) == 4 and all(type(x) is int for x in box.box) for box in boxes):
            raise ValueError("a box is four whole numbers")
    except ValueError as error:
        raise InputError(
            f"scene {row['image']} of {root} ({error}): the split is damaged"
        ) from error
    return tuple(boxes)


def _read_rows(path: Path, kinds: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line, with fields of these kinds."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check the split") from error
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            row = _check_row(json.loads(line.decode("utf-8")), kinds)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number} ({first_line(error)}): the split is damaged"
            ) from error
        yield row


def _check_row(row: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} instead of an object")
    for name, kind in kinds.items():
        if name not in row or type(row[name]) is not kind:
            raise ValueError(f"'{name}' is missing or no {kind.__name__}")
    return row
