"""LLaVA-PruMerge."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.methods.base import BaseMethod
from corematching.methods.vision_rule import VisionRule
from corematching.policies.check import normalize_amount
from corematching.policies.greedy import resolve_amount
from corematching.policies.vision_merging import (
    attend_to_patches,
    count_outliers,
    join_heads,
    prune_and_merge,
)
from corematching.protocol import VisionView


@dataclass(frozen=True)
class PruMergeRule(VisionRule, name="prumerge-rule"):
    """PruMerge's outliers of attention with their neighbours merged in: `prune_and_merge`."""

    def merge(self, vision: VisionView) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = join_heads(vision.queries), join_heads(vision.keys)
        scaling = keys.shape[-1] ** -0.5
        attention = attend_to_patches(queries, keys, scaling, vision.classes).squeeze(1)
        counts = count_outliers(attention)
        if self.keep_ratio is not None or self.keep_tokens is not None:
            totals = torch.full_like(counts, attention.shape[1])
            counts = resolve_amount(self.keep_ratio, self.keep_tokens, totals)
        patches = keys[:, 0, vision.classes :]
        kept, features = prune_and_merge(vision.features, attention, patches, counts)
        return kept, features, attention


@dataclass(frozen=True)
class PruMerge(BaseMethod, name="prumerge"):
    """Keep the outliers of the class token's attention, merged with what resembles them.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arXiv:2403.15388, without training: `prune_and_merge` has the rule and what differs. In front of
    layer 0; positions of the language model stay the original ones; all neurons. In a tower
    without a class token the attention that a patch gets from all others stands for its.
    """

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "ratio of each image's tokens kept; default: as many as outliers"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    vision_layer: int = field(
        default=-1,
        metadata={"help": "the tower's layer whose attention and keys are read; published: -1"},
    )

    def __post_init__(self) -> None:
        normalize_amount(self)
        super().__post_init__()

    def make_tokens(self) -> PruMergeRule:
        return PruMergeRule(self.keep_ratio, self.keep_tokens, self.vision_layer)
