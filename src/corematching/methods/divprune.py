"""DivPrune."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import TokenRule
from corematching.policies.budgets import budget_of
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.divprune import DivPruneScore


@dataclass(frozen=True)
class DivPrune(BaseMethod, name="divprune"):
    """Keep the projected features that are farthest from each other; all neurons.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arXiv:2503.02175; `DivPruneScore` has the rule. Dropped in front of layer 0. The released code's
    default ratio is 0.098.
    """

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept; default: 0.098"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.098)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        amount = self.keep_ratio, self.keep_tokens
        return TokenRule(DivPruneScore(*amount), budget_of(*amount), (-1,))
