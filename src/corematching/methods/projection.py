"""Attention times projection, the criterion that CoreMatching's theory starts from."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.sparsifier import TokenRule
from corematching.policies.budgets import budget_of
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.projection import ProjectionScore


@dataclass(frozen=True)
class Projection(BaseMethod, name="projection"):
    """Keep what moves the last token's attention output most along its direction; all neurons.

    "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
    Comprehensive Acceleration of Vision-Language Models", arXiv:2505.19235, the projection-guided
    criterion, computed exactly. No budget or layer is published for it: the defaults are
    those of the random control.
    """

    keep_ratio: float | None = field(
        default=None, metadata={"help": "ratio of the image tokens kept; default: 0.3"}
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    layer: int | float = field(
        default=0.3, metadata={"help": "ranked in this layer, dropped after it"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.3)
        super().__post_init__()

    def make_tokens(self) -> TokenRule:
        budget = budget_of(self.keep_ratio, self.keep_tokens)
        return TokenRule(ProjectionScore(), budget, (self.layer,))
