"""DivPrune's token score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from corematching.policies.base import TokenScore
from corematching.policies.check import normalize_amount
from corematching.policies.features import read_features
from corematching.policies.greedy import (
    cosine_similarity,
    order_by_distance,
    rank_picks,
    resolve_amount,
)
from corematching.protocol import EMBEDDINGS, PrefillView


@dataclass(frozen=True)
class DivPruneScore(TokenScore, name="divprune"):
    """Rank in the greedy max-min choice over the projected features, first picks highest.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arXiv:2503.02175: the set of image tokens whose smallest distance ``1 - cos`` is largest, picked
    greedily, starting with the token whose nearest neighbour is farthest away. The prompt's
    text plays no part. Tokens that were not picked score 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({EMBEDDINGS})

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "tokens to pick, of the image tokens; default: 0.098"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of tokens to pick, instead"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 0.098)

    def score(self, view: PrefillView) -> Tensor:
        features = read_features(view)
        counts = resolve_amount(self.keep_ratio, self.keep_tokens, view.image.sum(1))
        order = order_by_distance(1 - cosine_similarity(features), view.image, counts)
        return rank_picks(order, features)
