"""Per-token neuron rules: a neuron is computed for a token when its value passes a threshold.

TEAL ("Training-Free Activation Sparsity in Large Language Models", arXiv:2408.14690) thresholds the
magnitude of what enters each linear layer; for the neurons of an FFN that is
``|act(gate(x)) * up(x)|`` in front of ``down_proj``. CATS ("CATS: Contextually-Aware Thresholding
for Sparsity in Large Language Models", arXiv:2404.08763) thresholds ``|act(gate(x))|``, so that up
and down need to be computed for the survivors only. Both papers calibrate over a text corpus; the
functions here take any sample of tokens, such as the prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.statistics import find_size
from corematching.policies.activated import find_kth_largest
from corematching.policies.amounts import PPM, parts
from corematching.policies.broken import report_broken
from corematching.policies.check import check_ratio

SMALLEST = torch.finfo(torch.float32).tiny
"""The least cut, because smaller numbers count as 0 on some devices."""


def calibrate_threshold(
    values: Tensor, tokens: Tensor, sparsity: float, neurons: Tensor | None = None
) -> Tensor:
    """The smallest t for which at least ``sparsity`` of the entries have a magnitude of at most t.

    The empirical quantile of ``|values|``, one for each sample, over the neurons and tokens that
    count: ``t = min {t' : P(|v| <= t') >= sparsity}``.

    Parameters
    ----------
    values : Tensor
        (B, T, F), the thresholded values, in any float dtype.
    tokens : Tensor
        (B, T) bool, the tokens to calibrate over.
    sparsity : float
        Ratio of the entries to drop, in (0, 1].
    neurons : Tensor, optional
        (B, K) long, the neurons to calibrate over, such as the core ones; default: all.

    Returns
    -------
    Tensor
        (B,) float32; 0 for a sample without tokens.

    Raises
    ------
    ConfigError
        When ``sparsity`` is out of range; on the CPU also when every sample has a value that is NaN
        or infinite. Where only some have, a warning names them, and their threshold is 0. Other
        devices are not waited for: there NaN counts as larger than all numbers.
    """
    check_ratio("sparsity", sparsity)
    width = values.shape[-1] if neurons is None else neurons.shape[1]
    ranks = -(-tokens.sum(1) * width * parts(sparsity) // PPM)  # rounded up
    found = find_size(values.detach(), tokens, neurons, ranks)
    if found is not None:
        return found
    if not devices.on_host(values):
        return _calibrate_at_once(values, tokens, ranks, neurons)
    thresholds = values.new_zeros(len(values), dtype=torch.float32)
    broken = torch.zeros(len(values), dtype=torch.bool)
    for sample, chosen in enumerate(tokens):
        rows = values[sample, chosen]
        if neurons is not None:
            rows = rows[:, neurons[sample]]
        entries = rows.float().abs().flatten()
        if not entries.numel():
            continue
        broken[sample] = not math.isfinite(entries.max())
        if broken[sample]:
            continue
        largest = entries.numel() - int(ranks[sample]) + 1
        thresholds[sample] = find_kth_largest(entries, largest)[0]
    advice = "check the model's dtype for overflow"
    report_broken("the activations", broken, tokens.any(1), advice)
    return thresholds


def _calibrate_at_once(
    values: Tensor, tokens: Tensor, ranks: Tensor, neurons: Tensor | None
) -> Tensor:
    """The ``ranks``-th smallest magnitudes (B,), without waiting for the device."""
    if neurons is not None:
        values = values.gather(2, neurons.unsqueeze(1).expand(-1, values.shape[1], -1))
    sizes = values.float().abs().masked_fill(~tokens.unsqueeze(-1), torch.inf).flatten(1)
    last = (ranks - 1).clamp(min=0).unsqueeze(1)
    return torch.where(ranks > 0, sizes.sort(dim=1).values.gather(1, last).squeeze(1), 0.0)


def find_cut(values: Tensor, tokens: Tensor, ratio: float, neurons: Tensor | None = None) -> Tensor:
    """The smallest kept magnitude if about ``ratio`` of the entries are kept: ``|v| >= cut``.

    The float32 number after `calibrate_threshold`, so that what equals the quantile falls away, as
    in ``|v| > t``; 0, at which all stay, for ``ratio=1``.

    Parameters
    ----------
    values : Tensor
        (B, T, F), in any float dtype.
    tokens : Tensor
        (B, T) bool, the tokens to calibrate over.
    ratio : float
        Ratio of the entries to keep, in (0, 1].
    neurons : Tensor, optional
        (B, K) long, the neurons to calibrate over; default: all.

    Returns
    -------
    Tensor
        (B,) float32; 0 for a sample without tokens.
    """
    check_ratio("ratio", ratio)
    if ratio == 1:
        return values.new_zeros(len(values), dtype=torch.float32)
    threshold = calibrate_threshold(values, tokens, 1 - ratio, neurons)
    cut = threshold.nextafter(torch.full_like(threshold, torch.inf)).clamp(min=SMALLEST)
    return torch.where(tokens.any(1), cut, 0.0)
