"""GRIFFIN."""

from __future__ import annotations

from corematching.methods.registry import register_method
from corematching.methods.sparsifier import NeuronRule, Sparsifier
from corematching.policy.check import check_share
from corematching.policy.neuron_scores.griffin import Griffin
from corematching.policy.schedules import Uniform


@register_method("griffin", budgets=("beta",))
def griffin(beta: float = 0.5) -> Sparsifier:
    """The neurons with the largest share of the prompt's activations in the decode; all tokens.

    "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", arXiv:2404.01365:
    in every layer the top neurons by the l2 norm over the prompt of each token's
    activations scaled to length 1, fixed for the decode.

    Parameters
    ----------
    beta : float
        Share of the neurons kept in each layer; published: 0.5.
    """
    check_share("beta", beta)
    return Sparsifier(neurons=NeuronRule(Griffin(), Uniform(beta, multiple=1)))
