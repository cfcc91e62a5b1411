"""DivPrune."""

from __future__ import annotations

from corematching.methods.amounts import budget_of
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.token_scores.divprune import DivPrune


@register_method("divprune", budgets=("keep",))
def divprune(keep: int | float = 0.098) -> Sparsifier:
    """Keep the projected features that are farthest from each other; all neurons.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arXiv:2503.02175; `DivPrune` has the rule. Dropped in front of layer 0.

    Parameters
    ----------
    keep : int or float
        Image tokens kept, a share (float; the released code's default is 0.098) or a count (int).
    """
    budget = budget_of(keep)
    return Sparsifier(tokens=TokenRule(DivPrune(keep), budget, (-1,)))
