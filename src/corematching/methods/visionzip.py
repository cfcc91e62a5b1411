"""VisionZip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier
from corematching.methods.vision_rule import VisionRule
from corematching.policy.amounts import count_of
from corematching.policy.vision_merging import attend_to_patches, zip_tokens
from corematching.protocol import VisionView

CONTEXTUAL = 10 / 64
"""Share of the kept tokens that are merged ones: 10 of 64, 20 of 128, 30 of 192 as published."""


@dataclass(frozen=True)
class VisionZipRule(VisionRule, name="visionzip-rule"):
    """VisionZip's dominant and contextual tokens: `zip_tokens`."""

    def merge(self, vision: VisionView) -> tuple[Tensor, Tensor, Tensor]:
        patches = vision.features.shape[1]
        keep = 1.0 if self.keep is None else self.keep
        total = count_of(keep, patches) if isinstance(keep, float) else min(keep, patches)
        contextual = round(total * CONTEXTUAL)
        attention = attend_to_patches(vision.queries, vision.keys, vision.scaling, vision.classes)
        keys = vision.keys[:, :, vision.classes :]
        kept, features = zip_tokens(
            vision.features, attention, keys, total - contextual, contextual
        )
        return kept, features, attention.sum(1)


@register_method("visionzip", budgets=("keep",))
def visionzip(keep: int | float = 64 / 576, vision_layer: int = -2) -> Sparsifier:
    """Keep what the vision tower itself attends to, and merge the rest into a few; all neurons.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467,
    without training: `zip_tokens` has the rule and what differs. In front of layer 0, positions of
    the language model stay the original ones. In a tower without a class token the
    attention that a patch gets from all others stands for the class token's, as in the paper.

    Parameters
    ----------
    keep : int or float
        Image tokens kept of each image, a share (float; by default 64 of LLaVA-1.5's 576, one of
        three published budgets) or a count (int); 10 of 64 are merged ones.
    vision_layer : int
        The tower's layer whose attention and keys are read; published: the second to last.
    """
    return Sparsifier(tokens=VisionZipRule(keep, vision_layer))
