"""Pictures with as many questions as fit into one sequence, none of which sees another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from questions import FAMILIES, Interviewer, Question
from scenes import GRID, Composer, Scene

PATCHES = GRID * GRID
IGNORE = -100
MANY = 4


class ConversationStream(IterableDataset):
    """Endless batches of scenes with packed questions.

    Yields images (B, S, S, 3), token ids, positions, segments, targets and families, each (B, T):
    the text after the picture. Segment 0 is padding, 1, 2, ... the question-answer pairs, with
    positions that start anew.
    """

    def __init__(self, args: argparse.Namespace, tokenizer, seed: int, held_out: bool) -> None:
        self.args, self.tokenizer, self.seed, self.held_out = args, tokenizer, seed, held_out
        self.start = PATCHES + len(prefix_ids(tokenizer))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, 1 + (info.id if info else 0)))
        signs = {} if self.held_out else {"signs": self.args.signs}
        composer = Composer(self.args.sprites, self.held_out, **signs)
        interviewer = Interviewer(self.held_out, self.args.asked)
        encode = lru_cache(100_000)(self._encode)
        while True:
            scenes = [self._draw(composer, rng) for _ in range(self.args.batch)]
            packed = [self._pack(interviewer.ask_many(rng, scene), encode) for scene in scenes]
            images = np.stack([scene.image for scene in scenes])
            yield (torch.from_numpy(images), *torch.from_numpy(np.stack(packed)).unbind(1))

    def _draw(self, composer: Composer, rng: np.random.Generator) -> Scene:
        """A scene; for training only ``few`` of those with less than `MANY` things.

        Where all are wanted no number is drawn, so that a seed gives the scenes that it gave
        before there was a choice.
        """
        few = 1.0 if self.held_out else self.args.few
        while True:
            scene = composer.draw(rng)
            if few >= 1 or len(scene.items) >= MANY or rng.random() < few:
                return scene

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _pack(self, questions: list[Question], encode) -> np.ndarray:
        """(5, T): the questions that fit, in turn."""
        rows = np.zeros((5, self.args.text), np.int64)
        rows[3], rows[4] = IGNORE, -1
        used = 0
        for segment, question in enumerate(questions, start=1):
            asked = encode(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = encode(f"{question.answer}<|im_end|>")
            size = len(asked) + len(answer)
            if used + size > self.args.text:
                continue
            span = slice(used, used + size)
            used += size
            rows[0, span] = asked + answer
            rows[1, span] = range(self.start, self.start + size)
            rows[2, span] = segment
            rows[3, span] = [IGNORE] * (len(asked) - 1) + [*answer, IGNORE]
            rows[4, span] = FAMILIES.index(question.family)
        return rows


def prefix_ids(tokenizer) -> list[int]:
    """What stands before the picture."""
    return tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
