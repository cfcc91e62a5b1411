"""The control that looks at nothing: tokens at equal distances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.policy.base import TokenScore
from corematching.policy.check import check_amount
from corematching.policy.greedy import resolve_amount
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class Stride(TokenScore, name="stride"):
    """1 on tokens at equal distances in the prompt's order, 0 on all others.

    Of N image tokens the i-th of K is number ``floor((i + 1/2) * N / K)``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    first: int | float = field(
        default=0.2, metadata={"help": "tokens that get 1: a share (float) or a count (int)"}
    )

    def __post_init__(self) -> None:
        check_amount("first", self.first)

    def score(self, view: PrefillView) -> Tensor:
        totals = view.image.sum(1, keepdim=True)
        counts = resolve_amount(self.first, totals)
        i = torch.arange(view.image.shape[1], device=view.image.device)
        ticks = ((2 * i + 1) * totals).div(2 * counts.clamp(min=1), rounding_mode="floor")
        ticks = ticks.masked_fill(i >= counts, -1)  # (B, T)
        place = view.image.cumsum(1) - 1
        return (place.unsqueeze(2) == ticks.unsqueeze(1)).any(2).float()
