"""The stand-in for dropped neurons: their mean."""

from __future__ import annotations

from torch import Tensor


def average_dropped(total: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """Each dropped neuron's mean activation over the prompt, 0 on the kept ones.

    Parameters
    ----------
    total : Tensor
        (B, F) float32, the sum of the activations over the tokens.
    tokens : Tensor
        (B, T) bool, those tokens.
    indices : Tensor
        (B, K) long, the kept neurons.

    Returns
    -------
    Tensor
        (B, F), float32.
    """
    mean = total / tokens.sum(1, keepdim=True).clamp(min=1)
    return mean.scatter(1, indices, 0.0)
