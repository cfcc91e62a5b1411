"""Statistics of a prompt's activations, by kernels on their device.

Each function gives None where no kernel can run: no extension, no Triton, another device, dtype or
layout. The caller then has PyTorch's operators do it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from corematching import devices

log = logging.getLogger(__name__)

MODULES = {
    "cpu": "corematching.backends.cpu.native.selection",
    "cuda": "corematching.backends.cuda.triton_statistics",
}


def sum_rows(values: Tensor, tokens: Tensor, what: str) -> Tensor | None:
    """A sum over each sample's tokens, without a float32 copy.

    Parameters
    ----------
    values : Tensor
        (B, T, F), in a float dtype or bool.
    tokens : Tensor
        (B, T) bool, the tokens that count; the values of the others are not read.
    what : str
        ``values``, their ``sizes`` (magnitudes), or ``unit squares``: the squares of each token's
        values over their sum.

    Returns
    -------
    Tensor or None
        (B, F) float32, the same at each call.
    """
    module = _find(values.device.type)
    return None if module is None else module.sum_rows(values, tokens, what)


def sum_both(values: Tensor, tokens: Tensor, valid: Tensor, out: Tensor) -> bool:
    """Two sums over each sample's tokens in one launch, in parts that add up to them.

    Parameters
    ----------
    values : Tensor
        (B, T, F), in a float dtype.
    tokens, valid : Tensor
        (B, T) bool, the tokens whose ``unit squares`` count, and those whose ``values`` do; see
        `sum_rows`.
    out : Tensor
        (2, C, B, F) float32, contiguous: the C parts of both sums are written to it.

    Returns
    -------
    bool
        Whether a kernel could run; False on the CPU, where `sum_rows` is as good.
    """
    kernel = getattr(_find(values.device.type), "sum_both", None)
    return kernel is not None and bool(kernel(values, tokens, valid, out))


def weigh_marks(marks: Tensor, weights: Tensor) -> Tensor | None:
    """The weights (B, F), float32, of what each token marks, (B, T, F) bool: (B, T), or None."""
    module = _find(marks.device.type)
    return None if module is None else module.weigh_marks(marks, weights)


def mark_highest(values: Tensor, counts: Tensor | int, absolute: bool) -> Tensor | None:
    """Mark what is above 0 and not below each token's ``counts``-th largest of (B, T, F), or None.

    The counts, (B, T, 1) long or one number for all tokens, lie in [1, F].
    """
    module = _find(values.device.type)
    if isinstance(counts, int) and devices.on_host(values):
        counts = torch.full((*values.shape[:-1], 1), counts)
    return None if module is None else module.mark_highest(values, counts, absolute)


def mark_top_positive(values: Tensor, ppm: int) -> Tensor | None:
    """Mark the highest of each token's positive entries, (B, T, F), or None.

    Of P positive entries those not below the ``floor((P - 1) * ppm / 10**6) + 1``-th largest.
    """
    kernel = getattr(_find(values.device.type), "mark_top_positive", None)
    return None if kernel is None else kernel(values, ppm)


def pick_highest(scores: Tensor, count: int) -> Tensor | None:
    """The indices of each row's ``count`` highest scores, ascending; the first among ties.

    Parameters
    ----------
    scores : Tensor
        (B, F) float32.
    count : int
        At most F.

    Returns
    -------
    Tensor or None
        (B, count) long; on the CPU None also for a score that is NaN. On a GPU NaN is the highest.
    """
    module = _find(scores.device.type)
    return None if module is None else module.pick_highest(scores, count)


def find_size(
    values: Tensor, tokens: Tensor, neurons: Tensor | None, ranks: Tensor
) -> Tensor | None:
    """The ``ranks``-th smallest magnitude of each sample; no GPU is waited for.

    Parameters
    ----------
    values : Tensor
        (B, T, F), in a float dtype.
    tokens : Tensor
        (B, T) bool, the tokens that count.
    neurons : Tensor or None
        (B, K) long, the neurons that count; None: all.
    ranks : Tensor
        (B,) long, from 1; 0 for a sample without tokens.

    Returns
    -------
    Tensor or None
        (B,) float32; 0 for rank 0. On the CPU None also for values that are not finite; on a GPU
        NaN is larger than all numbers.
    """
    module = _find(values.device.type)
    return None if module is None else module.find_size(values, tokens, neurons, ranks)


@functools.cache
def import_or_none(name: str | None) -> Any:
    """A module of kernels by its full name, or None where it cannot be imported."""
    if name is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        log.debug("no kernels for prompts: %s: %s", name, error)
        return None


def _find(kind: str) -> Any:
    return import_or_none(MODULES.get(kind))
