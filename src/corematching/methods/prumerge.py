"""LLaVA-PruMerge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier
from corematching.methods.vision_rule import VisionRule
from corematching.policy.greedy import resolve_amount
from corematching.policy.vision_merging import (
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
        if self.keep is not None:
            counts = resolve_amount(self.keep, torch.full_like(counts, attention.shape[1]))
        patches = keys[:, 0, vision.classes :]
        kept, features = prune_and_merge(vision.features, attention, patches, counts)
        return kept, features, attention


@register_method("prumerge", budgets=("keep",))
def prumerge(keep: int | float | None = None, vision_layer: int = -1) -> Sparsifier:
    """Keep the outliers of the class token's attention, merged with what resembles them.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arXiv:2403.15388, without training: `prune_and_merge` has the rule and what differs. In front of
    layer 0; positions of the language model stay the original ones; all neurons. In a tower
    without a class token the attention that a patch gets from all others stands for its.

    Parameters
    ----------
    keep : int, float or None
        Image tokens kept of each image: None for the published number, which follows the outliers
        of the attention; a share (float) or a count (int) for comparisons at one budget.
    vision_layer : int
        The tower's layer whose attention and keys are read; published: the last.
    """
    return Sparsifier(tokens=PruMergeRule(keep, vision_layer))
