"""What stands in for the dropped neurons."""

from __future__ import annotations

from torch import Tensor

from corematching.policy.passes import sum_tokens


def average_dropped(activations: Tensor, tokens: Tensor, indices: Tensor) -> Tensor:
    """Each dropped neuron's mean activation over the prompt, 0 on the kept ones.

    Parameters
    ----------
    activations : Tensor
        (B, T, F).
    tokens : Tensor
        (B, T) bool, the tokens that the mean is taken over.
    indices : Tensor
        (B, K) long, the kept neurons.

    Returns
    -------
    Tensor
        (B, F), float32.
    """
    mean = sum_tokens(activations, tokens) / tokens.sum(1, keepdim=True).clamp(min=1)
    return mean.scatter(1, indices, 0.0)
