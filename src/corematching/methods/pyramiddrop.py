"""PyramidDrop."""

from __future__ import annotations

from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier
from corematching.methods.staged import StagedRule, scale_stages
from corematching.policy.token_scores.attention import Attention

PUBLISHED = (0.5, 0.25, 0.125)
LAYERS = (9 / 32, 17 / 32, 25 / 32)


@register_method("pyramiddrop", budgets=("keep",))
def pyramiddrop(
    keep: tuple[int | float, ...] | int | float = PUBLISHED,
    layer: tuple[int | float, ...] = LAYERS,
) -> Sparsifier:
    """Halve the image tokens after each quarter of the depth; all neurons.

    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", arXiv:2410.17247: four stages with a ratio of 0.5. Tokens are ranked by the last
    instruction token's attention, averaged over heads, in the first layer of the next stage: 8, 16
    and 24 of 32. The paper computes that layer's queries and keys beforehand and drops in front of
    it; here the layer itself runs and the tokens are dropped behind it, so that each
    stage is one layer longer and the ranking is the same.

    Parameters
    ----------
    keep : tuple, int or float
        Image tokens left by each stage, shares (float) or counts (int) of those at the start. One
        amount is what the last stage leaves, and the earlier ones leave four times and twice
        that.
    layer : tuple
        The ranking layers, as shares of the depth that still sees every token, or layer indices.
    """
    return Sparsifier(tokens=StagedRule(Attention(), scale_stages(keep, PUBLISHED), tuple(layer)))
