"""A control without scores: tokens at equal distances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.policies.base import TokenScore
from corematching.policies.check import normalize_amount
from corematching.policies.greedy import resolve_amount
from corematching.protocol import PrefillView


@dataclass(frozen=True)
class StrideScore(TokenScore, name="stride"):
    """1 on tokens at equal distances in the prompt's order, 0 on all others.

    Of N image tokens the i-th of K is number ``floor((i + 1/2) * N / K)``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "tokens to give 1, of the image tokens; default: 0.2"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of tokens to give 1, instead"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.2)

    def score(self, view: PrefillView) -> Tensor:
        totals = view.image.sum(1, keepdim=True)
        counts = resolve_amount(self.keep_ratio, self.keep_tokens, totals)
        i = torch.arange(view.image.shape[1], device=view.image.device)
        ticks = ((2 * i + 1) * totals).div(2 * counts.clamp(min=1), rounding_mode="floor")
        ticks = ticks.masked_fill(i >= counts, -1)  # (B, T)
        index = view.image.cumsum(1) - 1
        return (index.unsqueeze(2) == ticks.unsqueeze(1)).any(2).float()
