"""Uniform stride: the control that takes image tokens at equal distances."""

from __future__ import annotations

from corematching.methods.amounts import budget_of
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.token_scores.stride import Stride


@register_method("stride", budgets=("keep",))
def stride(
    keep: int | float = 0.3, layer: int | float = 0.3, proportional: bool = False
) -> Sparsifier:
    """Image tokens at equal distances in the prompt's order; all neurons.

    Parameters
    ----------
    keep : int or float
        Image tokens kept, a share (float) or a count (int).
    layer : int or float
        Dropped after this layer, where the random control drops them; -1 is the input.
    proportional : bool
        Attention to a kept token counts for the dropped ones most like it too.
    """
    budget = budget_of(keep)
    return Sparsifier(tokens=TokenRule(Stride(keep), budget, (layer,), proportional))
