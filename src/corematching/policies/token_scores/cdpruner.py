"""CDPruner's token score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from corematching.policies.base import TokenScore
from corematching.policies.check import normalize_amount
from corematching.policies.features import read_embeddings, read_features
from corematching.policies.greedy import (
    cosine_similarity,
    order_by_volume,
    rank_picks,
    resolve_amount,
)
from corematching.policies.tokens import check_token_set, select_tokens
from corematching.protocol import EMBEDDINGS, PrefillView

TINY = 1e-6


@dataclass(frozen=True)
class CDPrunerScore(TokenScore, name="cdpruner"):
    """Place in the greedy MAP choice of a DPP conditioned on the question, first picks highest.

    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arXiv:2506.10967: the kernel is ``diag(r) S diag(r)`` with S the cosine similarity of the image
    tokens' projected features, and r their relevance to the instruction, scaled to [0, 1]
    within the sample. Tokens that were not picked score 0.

    The published relevance is a cosine in CLIP's space between patches and the text tower's output
    (in the released code its negative, as CLIP's patches run against the text). A checkpoint of a
    vision-language model holds no such text tower, so the relevance here is the mean cosine between
    the token's projected feature and the language model's own input embeddings of the text, with
    its sign as it is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({EMBEDDINGS})

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "tokens to pick, of the image tokens; default: 64 / 576"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of tokens to pick, instead"}
    )
    token_set: str = field(
        default="question", metadata={"help": "text tokens that count: question | text"}
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 64 / 576)
        check_token_set(self.token_set)

    def score(self, view: PrefillView) -> Tensor:
        features = read_features(view)
        relevance = self.measure_relevance(view)
        kernel = relevance.unsqueeze(2) * cosine_similarity(features) * relevance.unsqueeze(1)
        counts = resolve_amount(self.keep_ratio, self.keep_tokens, view.image.sum(1))
        return rank_picks(order_by_volume(kernel, view.image, counts), features)

    def measure_relevance(self, view: PrefillView) -> Tensor:
        """(B, T), in [0, 1] on image tokens and 0 elsewhere; 1 where all are equally relevant."""
        unit = torch.nn.functional.normalize(read_embeddings(view), dim=-1)
        asked = select_tokens(view, self.token_set).unsqueeze(-1)
        query = unit.masked_fill(~asked, 0).sum(1) / asked.sum(1).clamp(min=1)  # (B, d)
        relevance = torch.einsum("btd,bd->bt", unit, query)
        least = torch.where(view.image, relevance, torch.inf).amin(1, keepdim=True)
        most = torch.where(view.image, relevance, -torch.inf).amax(1, keepdim=True)
        scaled = (relevance - least + TINY) / (most - least)
        scaled = torch.where(most - least > TINY, scaled, 1.0)
        return torch.where(view.image, scaled, 0.0)
