"""The intermediate neurons that a token activates.

Every function takes activations (B, T, F), the input of ``down_proj`` in any float dtype, and gives
a (B, T, F) bool mask. Neurons that tie with the last one chosen are all in, so that the result does
not depend on the order of the neurons; a neuron at exactly zero is never activated.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.statistics import mark_top_positive
from corematching.policies.amounts import PPM, count_of, parts
from corematching.policies.passes import count_positive, mark_largest


def activate_by_sign(activations: Tensor) -> Tensor:
    """``Gamma(x) = {n : a_n > 0}`` (CoreMatching, arXiv:2505.19235)."""
    return activations > 0


def activate_by_magnitude(activations: Tensor, ratio: float) -> Tensor:
    """The top ``ratio`` of the F neurons by ``|a|``, token by token."""
    count = count_of(ratio, activations.shape[-1])
    return mark_largest(activations, count, most=count, absolute=True)


def activate_top_positive(activations: Tensor, rho: float) -> Tensor:
    """``C_rho(x) = {n : a_n >= Percentile(A+, rho)}``, the top fraction of the positive entries.

    The percentile is the linearly interpolated one: of P positive entries the first
    ``floor((P - 1) * rho) + 1`` lie at or above it. A token without any activates nothing
    (CoreInfer, arXiv:2410.18311).
    """
    found = mark_top_positive(activations.detach(), parts(rho))
    if found is not None:
        return found
    counts = ((count_positive(activations) - 1) * parts(rho)).div(PPM, rounding_mode="floor") + 1
    most = int((activations.shape[-1] - 1) * rho) + 2
    return mark_largest(activations, counts, most, absolute=False)


def activate_shared_top_positive(activations: Tensor, rho: float, valid: Tensor) -> Tensor:
    """The top k positive entries with one k for all tokens of a sample.

    ``k = floor(rho * mean number of positive entries)``, at least 1: the variant in CoreInfer's
    released code. A token with fewer than k positive entries activates those it has.

    Parameters
    ----------
    valid : Tensor
        (B, T) bool, the tokens that the mean is taken over.
    """
    positives = count_positive(activations)
    total = (positives * valid.unsqueeze(-1)).sum(1, keepdim=True)
    tokens = valid.sum(1).clamp(min=1).view(-1, 1, 1)
    counts = (total * parts(rho)).div(PPM * tokens, rounding_mode="floor").clamp(min=1)
    most = int(activations.shape[-1] * rho) + 1
    return mark_largest(activations, counts.expand_as(positives), most, absolute=False)


def find_kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest entry along the last dimension, which stays with length 1.

    On the CPU through NumPy, whose partition is some ten times as fast as ``torch.kthvalue``.
    """
    rank = values.shape[-1] - k
    if not devices.on_host(values):
        return values.kthvalue(rank + 1, dim=-1, keepdim=True).values
    parted = np.partition(values.detach().float().numpy(), rank, axis=-1)
    return torch.from_numpy(parted[..., rank : rank + 1]).to(values.dtype)


def activate(activations: Tensor, by: str, ratio: float) -> Tensor:
    """The activated neurons by a rule's name: ``sign`` (ignores ``ratio``) or ``magnitude``."""
    return ACTIVATED_BY[by](activations, ratio)


ACTIVATED_BY = {
    "sign": lambda activations, ratio: activate_by_sign(activations),
    "magnitude": activate_by_magnitude,
}
