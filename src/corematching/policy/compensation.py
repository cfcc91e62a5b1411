"""What stands in for the dropped neurons."""

from __future__ import annotations

import torch
from torch import Tensor


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
    total = activations.masked_fill(~tokens.unsqueeze(-1), 0).sum(1, dtype=torch.float32)
    mean = total / tokens.sum(1, keepdim=True).clamp(min=1)
    return mean.scatter(1, indices, 0.0)
