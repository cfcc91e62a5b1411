"""The controls that every comparison needs."""

from __future__ import annotations

from corematching.methods.corematching import CoreMatching
from corematching.methods.registry import register_method
from corematching.methods.sparsifier import Sparsifier, TokenRule
from corematching.policy.budgets import Knee
from corematching.policy.token_scores import TokenOverlap


@register_method("dense")
def dense() -> Sparsifier:
    """Nothing is dropped: the model as it is, with a report."""
    return Sparsifier()


@register_method("random", budgets=("keep", "beta"))
def random(
    keep: int | float = 0.3,
    layer: int | float = 0.3,
    beta: float = 0.6,
    compensate: bool = False,
    proportional: bool = False,
) -> CoreMatching:
    """Random tokens and random neurons: others for each sample, the same for it in any batch."""
    return CoreMatching(
        token_score="random",
        neuron_score="random",
        keep=keep,
        cover=0.0,
        layer=layer,
        beta=beta,
        compensate=compensate,
        proportional=proportional,
        firing=None,
    )


@register_method("released-code")
def released_code(offset: int = -5) -> Sparsifier:
    """The rule of CoreMatching's released code, with tokens that are dropped and not zeroed.

    Overlap by sign with the fifth token from the end, cut at the knee after each of the layers 5 to
    18 of 32 (as a share of other depths); all neurons.
    """
    after = tuple((layer + 1) / 32 for layer in range(5, 19))
    return Sparsifier(tokens=TokenRule(TokenOverlap(offset=offset), Knee(), after=after))
