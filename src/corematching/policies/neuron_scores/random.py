"""The control for neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.policies.base import NeuronScore, read_activations
from corematching.policies.check import check_count
from corematching.policies.fingerprint import fingerprint
from corematching.policies.shuffle import hash_uniform
from corematching.protocol import ACTIVATIONS, EMBEDDINGS, PrefillView


@dataclass(frozen=True)
class RandomNeurons(NeuronScore, name="random"):
    """A random score from the seed, the layer and the sample's `fingerprint`, in any batch."""

    needs: ClassVar[frozenset[str]] = frozenset({ACTIVATIONS, EMBEDDINGS})

    seed: int = field(default=0, metadata={"help": "another seed, another choice"})

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)

    def score(self, view: PrefillView) -> Tensor:
        width = read_activations(view).shape[-1]
        neurons = torch.arange(width, device=view.valid.device)
        return hash_uniform(self.seed, view.layer + 1, fingerprint(view).unsqueeze(1), neurons)
