"""CDPruner."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import TokenRule
from corematching.policies.budgets import budget_of
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.cdpruner import CDPrunerScore


@dataclass(frozen=True)
class CDPruner(BaseMethod, name="cdpruner"):
    """Keep projected features that differ from each other and fit the question; all neurons.

    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arXiv:2506.10967. Dropped in front of layer 0. The relevance to the question comes from the
    language model's own text embeddings where the paper uses CLIP's text tower, which a checkpoint
    of a vision-language model does not hold; `CDPrunerScore` has the rule. The default is one of
    several published budgets, 64 of LLaVA-1.5's 576 tokens.
    """

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept; default: 64 of 576"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 64 / 576)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        amount = self.keep_ratio, self.keep_tokens
        return TokenRule(CDPrunerScore(*amount), budget_of(*amount), (-1,))
