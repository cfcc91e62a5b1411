"""Uniform stride: the control that takes image tokens at equal distances."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import TokenRule
from corematching.policies.budgets import budget_of
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.stride import StrideScore


@dataclass(frozen=True)
class Stride(BaseMethod, name="stride"):
    """Image tokens at equal distances in the prompt's order; all neurons."""

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept; default: 0.3"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    layer: int | float = field(
        default=0.3,
        metadata={"help": "dropped after this layer, as in the random control; -1: the input"},
    )
    proportional: bool = field(
        default=False,
        metadata={"help": "attention to a kept token counts for the dropped ones most like it too"},
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.3)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        amount = self.keep_ratio, self.keep_tokens
        return TokenRule(StrideScore(*amount), budget_of(*amount), (self.layer,), self.proportional)
