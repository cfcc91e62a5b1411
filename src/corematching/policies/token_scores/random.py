"""The control that every comparison needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corematching.policies.base import TokenScore
from corematching.policies.check import check_count
from corematching.policies.fingerprint import fingerprint
from corematching.policies.shuffle import hash_uniform
from corematching.protocol import EMBEDDINGS, PrefillView


@dataclass(frozen=True)
class RandomTokens(TokenScore, name="random"):
    """A random score per picture and question, independent of the batch.

    It depends on the seed, the layer, the sample's `fingerprint` and the token's index among the
    image tokens: the same input always gets the same choice, alone, in any batch and in every beam.
    """

    needs: ClassVar[frozenset[str]] = frozenset({EMBEDDINGS})

    seed: int = field(default=0, metadata={"help": "another seed, another choice"})

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)

    def score(self, view: PrefillView) -> Tensor:
        sample = fingerprint(view).unsqueeze(1)
        return hash_uniform(self.seed, view.layer + 1, sample, view.image.cumsum(1))
