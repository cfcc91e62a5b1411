"""Inputs that the kernels can read."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_ROWS = 2
"""A single row is a decode step, which is memory-bound and has kernels of its own."""
FEWEST_FLOAT_ROWS = 64
"""With fewer rows of float32, PyTorch's matrix products are faster."""
SMALL = 1 / 32
"""The size of a layer's input that does not outweigh what the layer adds to it."""


def make_probe(count: int, width: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """(1, count, width) numbers up to a size, to compare two computations on.

    In float32 there are at least as many rows as the kernels take.
    """
    count = max(count, FEWEST_FLOAT_ROWS) if dtype == torch.float32 else count
    return (size * torch.sin(torch.arange(1.0 * count * width))).to(dtype).view(1, count, width)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a plain CPU matrix of several rows, outside autograd and compilation."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def is_prompt(x: Tensor) -> bool:
    """Whether a tensor is `is_plain` with several tokens per sample, (B, T, d)."""
    return is_plain(x) and x.dim() == 3 and x.shape[1] >= FEWEST_ROWS
