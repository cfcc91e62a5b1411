"""Runs methods over a task: dense first, as the reference, then the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corematching.errors import ConfigError
from corematching.evaluate.answer import Batch, Subject, answer_batch, split_batches
from corematching.evaluate.board import make_board
from corematching.evaluate.machine import describe_machine
from corematching.evaluate.measure import condense, kl_from
from corematching.evaluate.store import Answer, FirstTokens, RunDirectory
from corematching.evaluate.task import Question, Task, pick_questions
from corematching.methods import Installable, method_from_text, text_at_budget

logger = logging.getLogger(__name__)

DENSE = "dense"
Progress = Callable[[str, int, int, float], None]
"""Called with a method's text, its answers so far, all its questions, the accuracy so far."""


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes
    ----------
    limit : int or None
        Ask this many questions, a random sample; None: all.
    seed : int
        Of the sample and of the intervals.
    batch : int
        Questions at a time.
    max_new_tokens : int
        The longest answer.
    """

    limit: int | None = None
    seed: int = 0
    batch: int = 16
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        for name in ("limit", "batch", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: give a whole number of at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: give a whole number of at least 0")


def make_methods(
    texts: Sequence[str], budgets: Sequence[float] | None = None
) -> dict[str, Installable]:
    """Methods by the text that names them, dense first.

    Parameters
    ----------
    texts : sequence of str
        As `method_from_text` reads them.
    budgets : sequence of float, optional
        Shares to keep: every method but dense is made at each of them; see `text_at_budget`.

    Raises
    ------
    ConfigError
        A name or a parameter is unknown or out of range, or a method has no budget.
    """
    if budgets:
        others = [text for text in texts if text != DENSE]
        texts = [text_at_budget(text, share) for text in others for share in budgets]
    return {text: method_from_text(text) for text in dict.fromkeys((DENSE, *texts))}


def evaluate(
    subject: Subject,
    task: Task[Any],
    methods: Mapping[str, Installable],
    directory: Path,
    plan: Plan | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run methods over a task and make the board.

    Answers that the directory holds already are not asked for again; the board has every method
    that was ever run to its end there.

    Parameters
    ----------
    subject : Subject
        The model.
    task : Task
    methods : mapping
        By the text that names them; dense is run whether it is among them or not.
    directory : Path
        Where the answers are kept.
    plan : Plan
        How to run.
    progress : callable, optional
        Called after each batch.
    command : str
        What the user ran, but for the methods; for the board.

    Returns
    -------
    dict
        The board, JSON-able; see `make_board`.

    Raises
    ------
    InputError
        The directory holds a run with other settings.
    UnsupportedModelError
        The model cannot be shortened.
    """
    plan = plan or Plan()
    questions = pick_questions(task, plan.limit, plan.seed)
    settings = list_settings(subject, task, plan, len(questions))
    run = RunDirectory(directory, settings)
    batches = split_batches(subject, task, questions, plan.batch)
    with run.hold():
        for text, method in {DENSE: method_from_text(DENSE), **methods}.items():
            run.enter(text, method.to_dict())
            worker = Worker(subject, task, run, plan, text, method)
            worker.answer(batches, progress or _ignore)
        return make_board(run, task, questions, command)


def list_settings(subject: Subject, task: Task[Any], plan: Plan, questions: int) -> dict[str, Any]:
    """What the answers hang on, besides the method."""
    from corematching import __version__

    model = subject.model
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
    }


def _ignore(text: str, done: int, total: int, accuracy: float) -> None:
    """No one watches."""


class Worker:
    """One method's way through the questions."""

    def __init__(
        self,
        subject: Subject,
        task: Task[Any],
        run: RunDirectory,
        plan: Plan,
        text: str,
        method: Installable,
    ) -> None:
        self.subject, self.task, self.plan = subject, task, plan
        self.text, self.method = text, method
        self.file = run.answers(text)
        self.first: FirstTokens = run.first_tokens()
        self.is_dense = method.tokens is None and method.neurons is None  # type: ignore[attr-defined]

    def answer(self, batches: Sequence[Sequence[Question]], progress: Progress) -> None:
        """Answer what has no answer yet.

        A batch that was written in part runs again as a whole, so that a run that was interrupted
        gives the same as one that was not.
        """
        done = self.file.read()
        dense = self.first.read()
        total = sum(map(len, batches))
        for batch in batches:
            missing = [
                q for q in batch if q.id not in done or (self.is_dense and q.id not in dense)
            ]
            if missing:
                said = answer_batch(
                    self.subject, self.method, self.task, batch, self.plan.max_new_tokens
                )
                kl = self._compare(batch, said, dense)
                answers = self._grade(batch, said, kl)
                self.file.append(a for a in answers if a.id not in done)
                done |= {a.id: a for a in answers if a.id not in done}
            right = sum(answer.correct for answer in done.values())
            progress(self.text, len(done), total, right / len(done))
        logger.info("%s: %d answers in %s", self.text, len(done), self.file.path)

    def _compare(
        self, batch: Sequence[Question], said: Batch, dense: dict[int, Any]
    ) -> Sequence[float]:
        """KL of the dense model's first token from this one; the dense one's are kept."""
        ids = [question.id for question in batch]
        if self.is_dense:
            self.first.append(ids, *condense(said.logits))
            return [0.0] * len(ids)
        words, log_probs = (
            torch.stack([dense[i][part] for i in ids]).to(said.logits.device) for part in (0, 1)
        )
        return [float(x) for x in kl_from(words, log_probs, said.logits)]

    def _grade(self, batch: Sequence[Question], said: Batch, kl: Sequence[float]) -> list[Answer]:
        report, size = said.report, len(batch)
        return [
            Answer(
                id=question.id,
                text=text,
                correct=self.task.is_correct(question, text),
                kl=distance,
                tokens_kept=sample.token_retention_ratio,
                neurons_kept=report.neuron_retention_ratio,
                prefill_flops=sample.prefill_flops,
                dense_prefill_flops=sample.dense_prefill_flops,
                decode_flops=sample.decode_flops,
                dense_decode_flops=sample.dense_decode_flops,
                kv_bytes=sample.kv_bytes,
                dense_kv_bytes=sample.dense_kv_bytes,
                vision_seconds=report.vision_seconds / size,
                prefill_seconds=report.prefill_seconds / size,
                decode_seconds=report.decode_seconds / size,
                new_tokens=sample.new_tokens,
                batch=size,
                layer_tokens=sample.layer_token_ratio,
            )
            for question, text, distance, sample in zip(
                batch, said.texts, kl, report.samples, strict=True
            )
        ]
