"""FastV."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import TokenRule
from corematching.policies.budgets import budget_of
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.attention import Attention


@dataclass(frozen=True)
class FastV(BaseMethod, name="fastv"):
    """Keep what the last token attends to in an early layer; all neurons.

    "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", arXiv:2403.06764: image tokens are ranked by the last token's attention
    in layer K - 1, averaged over heads, and the lowest ratio R of them is dropped in front of
    layer K. Published: K=2, R=50 %; here ``keep_ratio`` is 1 - R and ``layer`` is K - 1.
    """

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept, 1 - R; default: 0.5"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    layer: int | float = field(
        default=1, metadata={"help": "K - 1: ranked in this layer, dropped after it"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.5)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        budget = budget_of(self.keep_ratio, self.keep_tokens)
        return TokenRule(Attention(), budget, (self.layer,))
