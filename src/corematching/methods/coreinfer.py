"""CoreInfer."""

from __future__ import annotations

from corematching.methods.registry import register_method
from corematching.methods.sparsifier import NeuronRule, Sparsifier
from corematching.policy.check import check_share
from corematching.policy.neuron_scores.coreinfer import CoreInfer
from corematching.policy.schedules import DenseEnds


@register_method("coreinfer", budgets=("beta",))
def coreinfer(
    beta: float = 0.4,
    rho: float = 0.2,
    dense_first: int | float = 6 / 32,
    dense_last: int | float = 5 / 32,
) -> Sparsifier:
    """The sentence's core neurons in the decode; all tokens.

    "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive
    Sparse Activation", arXiv:2410.18311, as in its released code: one k for all tokens, layers 6
    to 26 of 32 thinned out (as shares of other depths) and the others dense.

    Parameters
    ----------
    beta : float
        Share of the neurons kept in each of those layers.
    rho : float
        Share of the mean number of positive activations that a token votes for.
    dense_first, dense_last : int or float
        First and last layers that keep all neurons.
    """
    check_share("beta", beta)
    schedule = DenseEnds(beta, first=dense_first, last=dense_last, multiple=1)
    return Sparsifier(neurons=NeuronRule(CoreInfer(rho=rho), schedule))
