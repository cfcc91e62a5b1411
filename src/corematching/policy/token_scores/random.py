"""The control that every comparison needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corematching.policy.base import TokenScore
from corematching.policy.check import check_count
from corematching.policy.shuffle import hash_uniform
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class RandomTokens(TokenScore, name="random"):
    """A random score that is the same for a sample in any row of any batch.

    It hangs on the seed, the layer, the number of image tokens and the token's place among them, so
    that the beams of one prompt, and a batch and its singles, agree.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    seed: int = field(default=0, metadata={"help": "another seed, another choice"})

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)

    def score(self, view: PrefillView) -> Tensor:
        total = view.image.sum(1, keepdim=True)
        place = view.image.cumsum(1)
        return hash_uniform(self.seed, view.layer + 1, total, place)
