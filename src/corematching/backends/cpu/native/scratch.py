"""Working memory of the kernels."""

from __future__ import annotations

import threading

import torch

LINE = 64
"""Bytes of a cache line."""


class Scratch(threading.local):
    """Memory that grows as needed and is kept, for every thread its own."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> int:
        """Where the first cache line begins, with ``size`` bytes of memory from there on."""
        if self._memory.numel() < size + LINE:
            self._memory = torch.empty(size + LINE, dtype=torch.uint8)
        return (self._memory.data_ptr() + LINE - 1) // LINE * LINE
