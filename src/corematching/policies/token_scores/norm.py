"""Size of a token's activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corematching.policies.base import TokenScore, read_activations
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Norm(TokenScore, name="norm"):
    """``||a(x)||``, the l2 norm of a token's activations."""

    def score(self, view: PrefillView) -> Tensor:
        return read_activations(view).float().norm(dim=-1)
