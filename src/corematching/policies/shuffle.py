"""Random numbers that depend on their keys, never on the row of the batch or the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def hash_uniform(*keys: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one for each combination of the keys, broadcast together.

    A 32-bit multiply-xorshift hash over the keys in turn, in int64.

    Parameters
    ----------
    keys : int or Tensor
        Whole numbers, at least one of them a long tensor.

    Returns
    -------
    Tensor
        float32, in steps of 2**-24.
    """
    return (hash_words(*keys) >> 8).to(torch.float32) / (1 << 24)


def hash_words(*keys: int | Tensor) -> Tensor:
    """The same as whole numbers in [0, 2**32), long."""
    state: Any = 0
    for key in keys:
        state = _mix((state * 31 + key + 0x9E3779B9) & _WORD)
    return state


def _mix(word: Any) -> Any:
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)
