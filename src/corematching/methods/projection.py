"""Attention times projection, the criterion that CoreMatching's theory starts from."""

from __future__ import annotations

from corematching.methods.amounts import budget_of
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.token_scores.projection import Projection


@register_method("projection", budgets=("keep",))
def projection(keep: int | float = 0.3, layer: int | float = 0.3) -> Sparsifier:
    """Keep what moves the last token's attention output most along its direction; all neurons.

    "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
    Comprehensive Acceleration of Vision-Language Models", arXiv:2505.19235, the projection-guided
    criterion, computed exactly. No budget or layer is published for it: the defaults are
    those of the random control.

    Parameters
    ----------
    keep : int or float
        Image tokens kept, a share (float) or a count (int).
    layer : int or float
        Scored in this layer and dropped after it.
    """
    return Sparsifier(tokens=TokenRule(Projection(), budget_of(keep), (layer,)))
