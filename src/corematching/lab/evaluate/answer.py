"""Answers of a model with a method to a batch of questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corematching import chat
from corematching.errors import InputError, translating
from corematching.lab.evaluate.oracle import BoxCoverage
from corematching.lab.evaluate.task import Question, Task
from corematching.media import open_picture
from corematching.report import Report
from corematching.runtime import Run

SAMPLED_VALUES = 64


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes
    ----------
    name : str
        Its name on the board.
    model : PreTrainedModel
    processor : ProcessorMixin
        With a tokenizer and an image processor.
    """

    name: str
    model: Any
    processor: Any

    def __post_init__(self) -> None:
        if not chat.takes_images(self.processor):
            raise InputError(
                f"'{self.name}' takes no pictures, the questions are about pictures: choose a "
                "vision-language model (see `corematching models`)"
            )

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @cached_property
    def digest(self) -> str:
        """A hash of a sample of every parameter, which changes when the weights do."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().flatten()
            step = max(1, flat.numel() // SAMPLED_VALUES)
            values = flat[::step][:SAMPLED_VALUES].float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Any:
        """Tokens and pixels of a batch, one picture and one question each, padded on the left."""
        with translating(
            f"the processor of '{self.name}' cannot take these questions and pictures",
            "repair its tokenizer and chat template",
        ):
            pairs = zip(prompts, images, strict=True)
            chats = [chat.ask(prompt, [image]) for prompt, image in pairs]
            return chat.encode(self.model, self.processor, chats)


@dataclass(frozen=True)
class Batch:
    """The answers of a model to a batch.

    Attributes
    ----------
    texts : list of str
        The answers.
    logits : Tensor
        (B, V) float32, of the first token.
    report : Report
        The run's report.
    """

    texts: list[str]
    logits: Tensor
    report: Report


class FirstLogits:
    """Sees the logits that the first token of an answer is chosen from."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        if self.value is None:
            self.value = output.logits[:, -1].float()


@contextmanager
def watching(model: Any) -> Iterator[FirstLogits]:
    """Watch a model's first logits for the length of a block."""
    first = FirstLogits()
    handle = model.register_forward_hook(first)
    try:
        yield first
    finally:
        handle.remove()


def encode_batch(subject: Subject, task: Task[Any], questions: Sequence[Question]) -> Any:
    """A model's input for a batch of questions, best of like length."""
    images = [read_picture(question.image) for question in questions]
    return subject.encode([task.prompt(question) for question in questions], images)


def show_scenes(method: Any, task: Task[Any], questions: Sequence[Question]) -> None:
    """Show an oracle the objects of the next batch; does nothing for other methods."""
    score = getattr(method.tokens, "score", None)
    if isinstance(score, BoxCoverage):
        sizes = [read_picture(question.image).size for question in questions]
        pairs = zip(questions, sizes, strict=True)
        score.show([task.areas(question, size) for question, size in pairs])


def answer_batch(subject: Subject, run: Run, inputs: Any, max_new_tokens: int) -> Batch:
    """Answer questions greedily.

    Parameters
    ----------
    subject : Subject
    run : Run
        The installed method's run.
    inputs : mapping
        From `encode_batch`.
    max_new_tokens : int
        Longest answer.
    """
    settings = subject.model.generation_config
    pad = settings.pad_token_id
    if pad is None:
        pad = subject.tokenizer.pad_token_id
    with watching(subject.model) as first, torch.inference_mode():
        output = subject.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        report = run.report
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = subject.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert first.value is not None
    return Batch([text.strip() for text in texts], first.value, report)


@lru_cache(maxsize=512)
def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises
    ------
    InputError
        It cannot be read.
    """
    try:
        return open_picture(path)
    except InputError as error:
        raise InputError(f"{error}; the split is damaged") from error


def split_batches(
    subject: Subject, task: Task[Any], questions: Sequence[Question], size: int
) -> list[list[Question]]:
    """Batches of questions of one family where possible, sorted by length.

    Answers of one family are of like length, so that few samples wait for a longer one.
    """
    order = {family: index for index, family in enumerate(task.families)}
    lengths = [len(subject.tokenizer(task.prompt(question))["input_ids"]) for question in questions]
    ranked = sorted(
        zip(questions, lengths, strict=True),
        key=lambda pair: (order[pair[0].family], pair[1], pair[0].id),
    )
    ordered = [question for question, _ in ranked]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
