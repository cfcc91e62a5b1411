"""CDPruner."""

from __future__ import annotations

from corematching.methods.amounts import budget_of
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.token_scores.cdpruner import CDPruner


@register_method("cdpruner", budgets=("keep",))
def cdpruner(keep: int | float = 64 / 576) -> Sparsifier:
    """Keep projected features that differ from each other and fit the question; all neurons.

    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arXiv:2506.10967. Dropped in front of layer 0. The relevance to the question comes from the
    language model's own text embeddings where the paper uses CLIP's text tower, which a checkpoint
    of a vision-language model does not hold; `CDPruner` has the rule.

    Parameters
    ----------
    keep : int or float
        Image tokens kept, a share (float; by default 64 of LLaVA-1.5's 576, one of
        several published budgets) or a count (int).
    """
    budget = budget_of(keep)
    return Sparsifier(tokens=TokenRule(CDPruner(keep), budget, (-1,)))
