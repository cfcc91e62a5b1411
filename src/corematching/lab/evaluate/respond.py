"""Runs batches of questions through methods, one by one, on one copy of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from corematching.errors import InputError
from corematching.lab.evaluate.answer import Batch, Subject, answer_batch, encode_batch, show_scenes
from corematching.lab.evaluate.measure import condense, kl_from
from corematching.lab.evaluate.plan import DENSE, Plan
from corematching.lab.evaluate.store import Answer
from corematching.lab.evaluate.task import Question, Task
from corematching.methods import BaseMethod
from corematching.protocol import GATE, INPUTS
from corematching.runtime import Recording, Run, record_prompt, replay_prompt

Distribution = tuple[NDArray[Any], NDArray[Any]]
"""(B, K) words and (B, K) log-probabilities, as `condense` gives them."""

KEPT_BYTES = 1 << 30
"""Inputs of batches that stay on an accelerator for the next method."""


@dataclass(frozen=True)
class Assignment:
    """A batch for a method to answer.

    Attributes
    ----------
    text : str
        The method.
    index : int
        The batch's number.
    batch : sequence of Question
    dense : Distribution or None
        The dense model's first tokens to compare with; None asks for them.
    """

    text: str
    index: int
    batch: Sequence[Question]
    dense: Distribution | None


@dataclass(frozen=True)
class Reply:
    """The answers of a method to an assignment.

    Attributes
    ----------
    text : str
        The method.
    answers : list of Answer
    first : Distribution or None
        The first tokens, where the assignment had none.
    """

    text: str
    answers: list[Answer]
    first: Distribution | None


class Respondent:
    """Answers assignments; a method stays installed until the next one is due.

    Parameters
    ----------
    subject : Subject
    task : Task
    methods : mapping
        By the text that names them.
    plan : Plan
    """

    def __init__(
        self, subject: Subject, task: Task[Any], methods: Mapping[str, BaseMethod], plan: Plan
    ) -> None:
        self.subject, self.task, self.methods, self.plan = subject, task, methods, plan
        self._at_work = ExitStack()
        self._run: Run | None = None
        self._text = ""
        self._recording: Recording | None = None
        self._recorded = -1
        self._inputs: dict[int, Any] = {}
        self._room = 0 if subject.model.device.type == "cpu" else KEPT_BYTES

    def close(self) -> None:
        """Remove the method from the model, forget the prompts."""
        self._take_off()
        self._recording, self._recorded = None, -1

    def _take_off(self) -> None:
        self._run = None
        self._at_work.close()

    def answer_all(self, assignments: Sequence[Assignment]) -> Iterator[Reply]:
        """The replies, in the assignments' order."""
        return map(self.answer, assignments)

    def answer(self, assignment: Assignment) -> Reply:
        """Put a batch to a method."""
        batch, inputs = assignment.batch, self._encode(assignment)
        shared = self.plan.share and assignment.text != DENSE
        if shared and assignment.index != self._recorded:
            self._record(inputs)
            self._recorded = assignment.index
        run = self._put_on(assignment.text)
        show_scenes(run.method, self.task, batch)
        with self._replaying(run) if shared else nullcontext():
            said = answer_batch(self.subject, run, inputs, self.plan.max_new_tokens)
        first, distances = None, [0.0] * len(batch)
        if assignment.dense is None:
            words, log_probs = condense(said.logits)
            first = words.cpu().numpy(), log_probs.cpu().numpy()
        else:
            device = said.logits.device
            words, log_probs = (torch.from_numpy(part).to(device) for part in assignment.dense)
            distances = kl_from(words, log_probs, said.logits).tolist()
        try:
            answers = grade(self.task, batch, said, distances, timed=not self.plan.share)
        except ValueError as error:
            raise InputError(
                f"'{assignment.text}' gave an answer with {error}: the model's logits are not "
                "finite, try --dtype float32"
            ) from error
        return Reply(assignment.text, answers, first)

    def _record(self, inputs: Any) -> None:
        """Record the part of a batch's prompts that is the same for all methods."""
        policies = [method.neurons for method in self.methods.values() if method.neurons]
        needs = {need for policy in policies for need in policy.needs}
        self._recording = None
        run = self._put_on(DENSE)
        with record_prompt(run, bool(policies), bool(needs & {GATE, INPUTS})) as recording:
            answer_batch(self.subject, run, inputs, 1)
        self._recording = recording

    def _replaying(self, run: Run) -> AbstractContextManager[None]:
        assert self._recording is not None
        return replay_prompt(run, self._recording)

    def _put_on(self, text: str) -> Run:
        if self._run is None or text != self._text:
            self._take_off()
            method = self.methods[text](self.subject.model, self.plan.engine)
            self._run, self._text = self._at_work.enter_context(method), text
        return self._run

    def _encode(self, assignment: Assignment) -> Any:
        """The batch's inputs, which are the same for every method."""
        if assignment.index in self._inputs:
            return self._inputs[assignment.index]
        inputs = encode_batch(self.subject, self.task, assignment.batch)
        size = sum(value.nbytes for value in inputs.values() if hasattr(value, "nbytes"))
        if size <= self._room:
            self._room -= size
            self._inputs[assignment.index] = inputs
        return inputs


def grade(
    task: Task[Any],
    batch: Sequence[Question],
    said: Batch,
    distances: Sequence[float],
    timed: bool = True,
) -> list[Answer]:
    """The answers with their grades and costs; prompts that methods share took 0 s."""
    report, size = said.report, len(batch)
    vision, prefill = (report.vision_seconds, report.prefill_seconds) if timed else (0.0, 0.0)
    return [
        Answer(
            id=question.id,
            text=text,
            correct=task.is_correct(question, text),
            kl=distance,
            tokens_kept=sample.token_retention_ratio,
            neurons_kept=report.neuron_retention_ratio,
            prefill_flops=sample.prefill_flops,
            dense_prefill_flops=sample.dense_prefill_flops,
            decode_flops=sample.decode_flops,
            dense_decode_flops=sample.dense_decode_flops,
            kv_bytes=sample.kv_bytes,
            dense_kv_bytes=sample.dense_kv_bytes,
            vision_seconds=vision / size,
            prefill_seconds=prefill / size,
            decode_seconds=report.decode_seconds / size,
            new_tokens=sample.new_tokens,
            batch=size,
            layer_tokens=sample.layer_token_ratio,
        )
        for question, text, distance, sample in zip(
            batch, said.texts, distances, report.samples, strict=True
        )
    ]
