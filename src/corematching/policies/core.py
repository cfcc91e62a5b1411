"""The core neurons of a sentence."""

from __future__ import annotations

from torch import Tensor

from corematching.backends.kernels.statistics import pick_highest
from corematching.policies.activated import activate_by_magnitude, activate_top_positive
from corematching.policies.amounts import count_of
from corematching.policies.passes import sum_tokens


def count_activations(activated: Tensor, tokens: Tensor) -> Tensor:
    """``f(n; s)``, in how many of the tokens each neuron is activated.

    Parameters
    ----------
    activated : Tensor
        (B, T, F) bool.
    tokens : Tensor
        (B, T) bool, the tokens that count.

    Returns
    -------
    Tensor
        (B, F) float32; counts are exact up to 2**24.
    """
    return sum_tokens(activated, tokens)


def pick_top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest of F scores, ascending by index; the first among ties.

    Parameters
    ----------
    scores : Tensor
        (B, F), any dtype.

    Returns
    -------
    Tensor
        (B, count) long.
    """
    found = pick_highest(scores.detach(), count)
    if found is not None:
        return found
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(dim=-1).values


def pick_core_neurons(
    activations: Tensor, tokens: Tensor, rho: float, beta: float, activated_by: str = "sign"
) -> Tensor:
    """``C_rho^beta(s)``, the ratio ``beta`` of the neurons in the most token-wise sets.

    The token-wise set is `activate_top_positive` (``sign``, the paper) or `activate_by_magnitude`.

    Returns
    -------
    Tensor
        (B, round(beta * F)) long, ascending.
    """
    pick = activate_top_positive if activated_by == "sign" else activate_by_magnitude
    counts = count_activations(pick(activations, rho), tokens)
    return pick_top(counts, count_of(beta, counts.shape[-1]))
