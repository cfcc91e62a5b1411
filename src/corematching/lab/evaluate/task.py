"""Tasks: questions about pictures, and the grading of answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from corematching.demo.sceneqa import FAMILIES, SceneQuestion, is_correct, load_sceneqa
from corematching.errors import ConfigError, InputError

Area = tuple[float, float, float, float]


class Question(Protocol):
    """One question about one picture."""

    @property
    def id(self) -> int: ...

    @property
    def image(self) -> Path: ...

    @property
    def family(self) -> str: ...


Q = TypeVar("Q", bound=Question)


class Task(Protocol[Q]):
    """A set of questions.

    Attributes
    ----------
    name : str
        Its name on the board.
    digest : str
        Changes when a question or an answer does.
    families : sequence of str
        The families of questions, in the board's order.
    questions : sequence of Question
        All of them, in the task's order.
    """

    name: str
    digest: str
    families: Sequence[str]
    questions: Sequence[Q]

    def prompt(self, question: Q) -> str:
        """The prompt text for a question."""
        ...

    def is_correct(self, question: Q, answer: str) -> bool:
        """Whether an answer is right."""
        ...

    def agree(self, question: Q, answer: str, other: str) -> bool:
        """Whether two answers say the same."""
        ...

    def areas(self, question: Q, size: tuple[int, int]) -> Sequence[Area]:
        """The objects of a picture of ``size`` (width, height) pixels, for the oracle.

        (left, top, right, bottom) of each object, in fractions of the picture; empty if not known.
        """
        ...


@dataclass
class SceneQA:
    """SceneQA, the shipped test split or another one; answers count by exact match.

    Examples
    --------
    >>> SceneQA.load().families[0]
    'exists'
    """

    name: str
    digest: str
    families: Sequence[str]
    questions: Sequence[SceneQuestion]

    @classmethod
    def load(cls, directory: Path | str | None = None) -> SceneQA:
        """Load a split.

        Parameters
        ----------
        directory : path, optional
            Default: the shipped test split.

        Raises
        ------
        InputError
            The folder is no split of SceneQA, or its pictures are not there.
        """
        questions = load_sceneqa(directory)
        name = f"SceneQA {Path(directory).name}" if directory else "SceneQA test split"
        digest = hashlib.sha256()
        for question in questions:
            if not question.image.is_file():
                raise InputError(f"no picture {question.image}: the split is not complete")
            text = (question.id, question.image.name, question.question, question.answer)
            digest.update(repr(text).encode())
        asked = {question.family for question in questions}
        families = [family for family in FAMILIES if family in asked]
        families += sorted(asked - set(families))
        return cls(name, digest.hexdigest()[:16], families, questions)

    def prompt(self, question: SceneQuestion) -> str:
        """The question, unchanged."""
        return question.question

    def is_correct(self, question: SceneQuestion, answer: str) -> bool:
        """Exact match after normalisation."""
        return question.is_correct(answer)

    def agree(self, question: SceneQuestion, answer: str, other: str) -> bool:
        """Exact match of two answers after normalisation."""
        return is_correct(question.family, answer, other)

    def areas(self, question: SceneQuestion, size: tuple[int, int]) -> list[Area]:
        """The boxes of the scene."""
        width, height = size
        return [
            (x / width, y / height, (x + w) / width, (y + h) / height)
            for x, y, w, h in (item.box for item in question.items)
        ]


def pick_questions(task: Task[Any], limit: int | None, seed: int) -> list[Any]:
    """A random sample of a task's questions, in the task's order; all of them without a limit.

    Raises
    ------
    ConfigError
        The limit is below 1.
    """
    questions: list[Any] = list(task.questions)
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise ConfigError(f"limit={limit}: give a whole number of at least 1")
    chosen = np.random.default_rng(seed).choice(len(questions), limit, replace=False)
    return [questions[index] for index in sorted(chosen)]
