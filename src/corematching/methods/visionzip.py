"""VisionZip."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from corematching.methods.base import BaseMethod
from corematching.methods.vision_rule import VisionRule
from corematching.policies.amounts import count_of
from corematching.policies.check import normalize_amount
from corematching.policies.vision_merging import attend_to_patches, zip_tokens
from corematching.protocol import VisionView

CONTEXTUAL = 10 / 64
"""Ratio of the kept tokens that are merged ones: 10 of 64, 20 of 128, 30 of 192 as published."""


@dataclass(frozen=True)
class VisionZipRule(VisionRule, name="visionzip-rule"):
    """VisionZip's dominant and contextual tokens: `zip_tokens`."""

    def merge(self, vision: VisionView) -> tuple[Tensor, Tensor, Tensor]:
        patches = vision.features.shape[1]
        total = patches if self.keep_ratio is None else count_of(self.keep_ratio, patches)
        if self.keep_tokens is not None:
            total = min(self.keep_tokens, patches)
        contextual = round(total * CONTEXTUAL)
        attention = attend_to_patches(vision.queries, vision.keys, vision.scaling, vision.classes)
        keys = vision.keys[:, :, vision.classes :]
        kept, features = zip_tokens(
            vision.features, attention, keys, total - contextual, contextual
        )
        return kept, features, attention.sum(1)


@dataclass(frozen=True)
class VisionZip(BaseMethod, name="visionzip"):
    """Keep what the vision tower itself attends to, and merge the rest into a few; all neurons.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467,
    without training: `zip_tokens` has the rule and what differs. In front of layer 0, positions of
    the language model stay the original ones. In a tower without a class token the
    attention that a patch gets from all others stands for the class token's, as in the paper. The
    default is one of three published budgets, 64 of LLaVA-1.5's 576 tokens; 10 of 64 are merged
    ones.
    """

    keep_ratio: float | None = field(
        default=None,
        metadata={"help": "ratio of each image's tokens kept; default: 64 of 576"},
    )
    keep_tokens: int | None = field(
        default=None, metadata={"help": "number of image tokens kept, instead"}
    )
    vision_layer: int = field(
        default=-2,
        metadata={"help": "the tower's layer whose attention and keys are read; published: -2"},
    )

    def __post_init__(self) -> None:
        normalize_amount(self, 64 / 576)
        super().__post_init__()

    def make_tokens(self) -> VisionZipRule:
        return VisionZipRule(self.keep_ratio, self.keep_tokens, self.vision_layer)
