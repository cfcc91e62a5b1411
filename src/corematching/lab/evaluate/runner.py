"""Runs methods over a task: dense first, as the reference, then the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corematching.extras import require_plots
from corematching.lab.evaluate.answer import Subject, split_batches
from corematching.lab.evaluate.board import make_board
from corematching.lab.evaluate.jobs import Crew
from corematching.lab.evaluate.machine import describe_machine
from corematching.lab.evaluate.plan import DENSE, Plan
from corematching.lab.evaluate.respond import Assignment, Distribution, Reply, Respondent
from corematching.lab.evaluate.store import Answer, AnswerFile, RunDirectory
from corematching.lab.evaluate.task import Question, Task, pick_questions
from corematching.methods import BaseMethod, method_from_text, text_at_budget

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, float], None]
"""Called with a method's text, its answers so far, all its questions, the accuracy so far."""


def make_methods(
    texts: Sequence[str], budgets: Sequence[float] | None = None
) -> dict[str, BaseMethod]:
    """Methods by the text that names them, dense first.

    Parameters
    ----------
    texts : sequence of str
        As `method_from_text` reads them.
    budgets : sequence of float, optional
        Ratios to keep: every method but dense is made at each of them; see `text_at_budget`.

    Raises
    ------
    ConfigError
        A name or a parameter is unknown or out of range, or a method has no budget.
    """
    if budgets:
        others = [text for text in texts if text != DENSE]
        texts = [text_at_budget(text, ratio) for text in others for ratio in budgets]
    return {text: method_from_text(text) for text in dict.fromkeys((DENSE, *texts))}


def evaluate(
    subject: Subject,
    task: Task[Any],
    methods: Mapping[str, BaseMethod],
    directory: Path,
    plan: Plan | None = None,
    progress: Progress | None = None,
    command: str = "",
    crew: Crew | Respondent | None = None,
) -> dict[str, Any]:
    """Run methods over a task and make the board.

    Stored answers are reused; the board has every method with a complete run in the directory.

    Parameters
    ----------
    subject : Subject
        The model.
    task : Task
    methods : mapping
        By the text that names them; dense always runs.
    directory : Path
        Where the answers are kept.
    plan : Plan
        Settings of the run.
    progress : callable, optional
        Called after each batch.
    command : str
        What the user ran, but for the methods; for the board.
    crew : Crew or Respondent, optional
        Processes that answer, with the same model, task, methods and plan; default: this one.

    Returns
    -------
    dict
        The board, JSON-able; see `make_board`.

    Raises
    ------
    InputError
        The directory holds a run with other settings.
    MissingPackageError
        matplotlib, which draws the board's pictures, is not installed.
    UnsupportedModelError
        The model cannot be shortened.
    """
    require_plots("the board")
    plan = plan or Plan()
    questions = pick_questions(task, plan.limit, plan.seed)
    settings = list_settings(subject, task, plan, len(questions))
    run = RunDirectory(directory, settings)
    batches = split_batches(subject, task, questions, plan.batch)
    methods = {**methods, DENSE: method_from_text(DENSE)}
    with run.hold(), ExitStack() as stack:
        crew = crew or stack.enter_context(closing(Respondent(subject, task, methods, plan)))
        survey = Survey(run, batches, crew.answer_all, progress or _ignore, plan.share)
        _survey_all(run, survey, methods)
        return make_board(run, task, questions, command)


def _survey_all(run: RunDirectory, survey: Survey, methods: Mapping[str, BaseMethod]) -> None:
    """The dense answers first, which the others are compared with."""
    for texts in ([DENSE], [text for text in methods if text != DENSE]):
        for text in texts:
            run.enter(text, methods[text].to_dict())
        survey.answer(texts)


def list_settings(subject: Subject, task: Task[Any], plan: Plan, questions: int) -> dict[str, Any]:
    """The settings that answers depend on, besides the method."""
    from corematching import __version__

    model = subject.model
    engine = {} if plan.engine == "auto" else {"engine": plan.engine}
    shared = {"shared": True} if plan.share else {}
    return {
        "model": subject.name,
        "weights": subject.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": str(model.config._attn_implementation),
        "task": task.name,
        "task_digest": task.digest,
        "questions": questions,
        "seed": plan.seed,
        "max_new_tokens": plan.max_new_tokens,
        "corematching": __version__,
        "torch": torch.__version__,
        "machine": describe_machine(model.device),
        **engine,
        **shared,
    }


def _ignore(text: str, done: int, total: int, accuracy: float) -> None:
    """Report no progress."""


class Survey:
    """All batches, put to one method or to several.

    Parameters
    ----------
    run : RunDirectory
        Where the answers go.
    batches : sequence
        The questions.
    answer : callable
        Gives the replies to assignments, in any order.
    progress : callable
        Called after each batch.
    by_batch : bool
        Put a batch to all methods before the next one; else all batches to a method.
    """

    def __init__(
        self,
        run: RunDirectory,
        batches: Sequence[Sequence[Question]],
        answer: Callable[[Sequence[Assignment]], Iterator[Reply]],
        progress: Progress,
        by_batch: bool = False,
    ) -> None:
        self.run, self.batches, self.progress = run, batches, progress
        self.by_batch = by_batch
        self._answer = answer
        self._total = sum(map(len, batches))
        self._done: dict[str, dict[int, Answer]] = {}
        self._files: dict[str, AnswerFile] = {}

    def answer(self, texts: Sequence[str]) -> None:
        """Answer what has no answer yet.

        A batch that was written in part runs again as a whole, so that a run that was interrupted
        gives the same as one that was not.

        Parameters
        ----------
        texts : sequence of str
            Dense alone, or methods that are compared with it.
        """
        first = self.run.first_tokens().read()
        references: list[Distribution | None] = [
            None if DENSE in texts else _stack([first[question.id] for question in batch])
            for batch in self.batches
        ]
        assignments = []
        for text in texts:
            file = self.run.answers(text)
            if file.path in {other.path for other in self._files.values()}:
                continue  # the same method by another name
            self._files[text], self._done[text] = file, file.read()
            known = self._done[text].keys() & first.keys()
            if self._done[text]:
                self._tell(text)
            assignments += [
                Assignment(text, index, batch, references[index])
                for index, batch in enumerate(self.batches)
                if not all(question.id in known for question in batch)
            ]
        if self.by_batch:
            assignments.sort(key=lambda assignment: assignment.index)
        for reply in self._answer(assignments):
            self._keep(reply)
        for text in self._files.keys() & set(texts):
            logger.info("%s: %d answers", text, len(self._done[text]))

    def _keep(self, reply: Reply) -> None:
        done = self._done[reply.text]
        if reply.first is not None:
            words, log_probs = map(torch.from_numpy, reply.first)
            self.run.first_tokens().append(
                [answer.id for answer in reply.answers], words, log_probs
            )
        fresh = [answer for answer in reply.answers if answer.id not in done]
        self._files[reply.text].append(fresh)
        done |= {answer.id: answer for answer in fresh}
        self._tell(reply.text)

    def _tell(self, text: str) -> None:
        done = self._done[text].values()
        self.progress(text, len(done), self._total, sum(a.correct for a in done) / len(done))


def _stack(parts: Sequence[tuple[Tensor, Tensor]]) -> Distribution:
    """The distributions of a batch, (B, K) each, from those of its questions."""
    words, log_probs = (torch.stack(part).numpy() for part in zip(*parts, strict=True))
    return words, log_probs
