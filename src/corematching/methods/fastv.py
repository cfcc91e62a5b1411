"""FastV."""

from __future__ import annotations

from corematching.methods.amounts import budget_of
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.token_scores.attention import Attention


@register_method("fastv", budgets=("keep",))
def fastv(keep: int | float = 0.5, layer: int | float = 1) -> Sparsifier:
    """Keep what the last token attends to in an early layer; all neurons.

    "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", arXiv:2403.06764: image tokens are ranked by the last token's attention
    in layer K - 1, averaged over heads, and the lowest share R of them is dropped in front of
    layer K. Published: K=2, R=50 %.

    Parameters
    ----------
    keep : int or float
        1 - R, or a number of image tokens.
    layer : int or float
        K - 1.
    """
    return Sparsifier(tokens=TokenRule(Attention(), budget_of(keep), (layer,)))
