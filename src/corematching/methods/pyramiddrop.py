"""PyramidDrop."""

from __future__ import annotations

from dataclasses import dataclass, field

from corematching.methods.base import BaseMethod
from corematching.methods.staged import StagedRule, make_stages
from corematching.policies.check import normalize_amount
from corematching.policies.token_scores.attention import Attention

PUBLISHED = (0.5, 0.25, 0.125)
LAYERS = (9 / 32, 17 / 32, 25 / 32)


@dataclass(frozen=True)
class PyramidDrop(BaseMethod, name="pyramiddrop"):
    """Halve the image tokens after each quarter of the depth; all neurons.

    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", arXiv:2410.17247: four stages with a ratio of 0.5. Tokens are ranked by the last
    instruction token's attention, averaged over heads, in the first layer of the next stage: 8, 16
    and 24 of 32. The paper computes that layer's queries and keys beforehand and drops in front of
    it; here the layer itself runs and the tokens are dropped behind it, so that each
    stage is one layer longer and the ranking is the same.
    """

    keep_ratio: float | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": "ratio of the image tokens that each stage leaves, or what the last one "
            "leaves, the earlier ones in the published proportions"
        },
    )
    keep_tokens: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "the same as numbers of tokens, instead"}
    )
    layer: tuple[int | float, ...] = field(
        default=LAYERS,
        metadata={"help": "the ranking layers (int), or ratios of the depth that sees all"},
    )

    def __post_init__(self) -> None:
        normalize_amount(self, PUBLISHED, several=True)
        object.__setattr__(self, "layer", tuple(self.layer))
        super().__post_init__()

    def make_tokens(self) -> StagedRule:
        budgets = make_stages(self.keep_ratio, self.keep_tokens, PUBLISHED)
        return StagedRule(Attention(), budgets, self.layer)
