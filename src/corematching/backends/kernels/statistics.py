"""What is chosen from a prompt, by the kernels of the device it lies on.

Each function gives None where no kernel can run: no extension, no Triton, another device, dtype or
layout. The caller then has PyTorch's operators do it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

from torch import Tensor

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


def weigh_marks(marks: Tensor, weights: Tensor) -> Tensor | None:
    """The weights (B, F), float32, of what each token marks, (B, T, F) bool: (B, T), or None."""
    module = _find(marks.device.type)
    return None if module is None else module.weigh_marks(marks, weights)


def mark_highest(values: Tensor, counts: Tensor, absolute: bool) -> Tensor | None:
    """Mark what is above 0 and not below each token's ``counts``-th largest of (B, T, F), or None.

    The counts, (B, T, 1) long, lie in [1, F].
    """
    module = _find(values.device.type)
    return None if module is None else module.mark_highest(values, counts, absolute)


def pick_highest(scores: Tensor, count: int) -> Tensor | None:
    """The places of each row's ``count`` highest scores, ascending; of equal ones the first.

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
        (B,) float32; 0 where the rank is. On the CPU None also for what is not finite; on a GPU NaN
        is larger than all numbers.
    """
    module = _find(values.device.type)
    return None if module is None else module.find_size(values, tokens, neurons, ranks)


@functools.cache
def _find(kind: str) -> Any:
    """The module of a kind of device, or None."""
    if kind not in MODULES:
        return None
    try:
        return importlib.import_module(MODULES[kind])
    except ImportError as error:
        log.debug("no kernels for prompts on '%s': %s", kind, error)
        return None
