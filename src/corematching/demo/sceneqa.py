"""SceneQA: the shipped test split of 400 pictures and 2,000 questions, and its scorer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from corematching.errors import InputError

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
        Its place in the split.
    image : Path
        A 224 x 224 picture.
    family : str
        One of `FAMILIES`.
    question, answer : str
        The text asked and the reference answer.
    new_wording : bool
        Whether training never phrased a question so.
    items : tuple of Box
        What the picture holds, for oracles.
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
        If the folder is not a split of SceneQA.
    """
    root = Path(directory) if directory else _DIRECTORY
    for name in ("questions.jsonl", "scenes.jsonl"):
        if not (root / name).is_file():
            raise InputError(f"no {name} in {root}: pass the folder of a SceneQA split")
    scenes = {
        row["image"]: tuple(
            Box(item["name"], item["word"], tuple(item["box"])) for item in row["items"]
        )
        for row in _read_rows(root / "scenes.jsonl")
    }
    return [
        SceneQuestion(
            id=row["id"],
            image=root / row["image"],
            family=row["family"],
            question=row["question"],
            answer=row["answer"],
            new_wording=row["new_wording"],
            items=scenes[row["image"]],
        )
        for row in _read_rows(root / "questions.jsonl")
    ]


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


def _read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
