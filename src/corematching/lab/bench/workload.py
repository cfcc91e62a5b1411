"""Requests: one prompt, with a different picture each time."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from corematching.errors import ConfigError
from corematching.lab.bench.shapes import Shape
from corematching.lab.evaluate import Subject

QUESTION = "Describe the picture."
FILLER = " please"
PICTURE_SIDE = 336
PATCHES = 21


class Workload(Protocol):
    """A model's requests."""

    name: str
    random_weights: bool
    batch: int

    @property
    def model(self) -> Any:
        """The model behind the requests."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of one sample's prompt, its picture's included."""
        ...

    def open(self, number: int) -> Any:
        """The inputs of a request, in memory before its clock runs."""
        ...

    def prepare(self, opened: Any) -> dict[str, Any]:
        """The model's inputs for it; this is the preprocessing."""
        ...

    def describe(self, number: int) -> dict[str, Any]:
        """The same request for another process, as plain values."""
        ...


def make_picture(number: int, side: int = PICTURE_SIDE) -> Image.Image:
    """A picture of coloured squares, another one for each number."""
    colours = np.random.default_rng(number).integers(0, 256, (PATCHES, PATCHES, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)


@dataclass
class LoadedWorkload:
    """Requests to a loaded model, through its own processor.

    Parameters
    ----------
    name : str
    model : PreTrainedModel
    processor : ProcessorMixin
    batch : int
        Samples of a request, one picture each.
    text_tokens : int or None
        Least number of text tokens, the chat template's included; the question is padded with words
        until it has them. None: the question as it is.
    """

    name: str
    model: Any
    processor: Any
    batch: int = 1
    text_tokens: int | None = None
    random_weights: bool = field(default=False, init=False)
    question: str = field(default=QUESTION, init=False)

    def __post_init__(self) -> None:
        self._subject = Subject(self.name, self.model, self.processor)
        self._folder = tempfile.TemporaryDirectory(prefix="corematching-bench-")
        missing = (self.text_tokens or 0) - self._count_text()
        self.question += FILLER * max(missing, 0)

    @cached_property
    def prompt_tokens(self) -> int:
        return int(self.prepare(self.open(0))["input_ids"].shape[1])

    def open(self, number: int) -> list[Image.Image]:
        return [make_picture(number * self.batch + index) for index in range(self.batch)]

    def prepare(self, opened: list[Image.Image]) -> dict[str, Any]:
        return dict(self._subject.encode([self.question] * len(opened), opened))

    def describe(self, number: int) -> dict[str, Any]:
        paths = []
        for index, picture in enumerate(self.open(number)):
            path = Path(self._folder.name) / f"{number}-{index}.png"
            picture.save(path)
            paths.append(str(path))
        asked = {"images": paths, "question": self.question, "number": number}
        return {**asked, "prompt_tokens": self.prompt_tokens}

    def _count_text(self) -> int:
        ids = self._subject.encode([self.question], [make_picture(0)])["input_ids"]
        config = self.model.config
        image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", -1)
        return int((ids != image).sum())


@dataclass
class RandomWorkload:
    """Requests of random ids and random pixels to a shape with random weights.

    There is no processor, so nothing counts as preprocessing.

    Parameters
    ----------
    shape : Shape
    model : PreTrainedModel
    batch : int
    text_tokens : int
        Text tokens of a prompt.
    """

    shape: Shape
    model: Any
    batch: int = 1
    text_tokens: int = 64
    random_weights: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        least = len(self.shape.before + self.shape.after) + 1
        if self.text_tokens < least:
            raise ConfigError(
                f"{self.text_tokens} text tokens are too few for {self.shape.name}: "
                f"give --prompt-tokens {least} or more"
            )

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def prompt_tokens(self) -> int:
        return self.shape.image_tokens + self.text_tokens

    def prepare(self, opened: dict[str, Any]) -> dict[str, Any]:
        return opened

    def open(self, number: int) -> dict[str, Any]:
        shape, device = self.shape, self.model.device
        draw = torch.Generator(device=device).manual_seed(number)
        image = [*shape.before, *[shape.image_id] * shape.image_tokens, *shape.after]
        rest = self.prompt_tokens - len(image)
        high = min(shape.text["vocab_size"] - 64, 30_000)
        text = torch.randint(3, high, (self.batch, rest), generator=draw, device=device)
        ids = torch.cat([torch.tensor([image] * self.batch, device=device), text], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, size in shape.pixels.items():
            noise = torch.randn((self.batch, *size), generator=draw, device=device)
            noise = noise.to(self.model.dtype)
            inputs[name] = noise.flatten(0, 1) if shape.patch_rows else noise
        for name, values in shape.extras(self.batch).items():
            inputs[name] = torch.tensor(values, device=device)
        if shape.token_types:
            inputs[shape.token_types] = (ids == shape.image_id).int()
        return inputs

    def describe(self, number: int) -> dict[str, Any]:
        return {"number": number, "prompt_tokens": self.prompt_tokens}
