"""What C code may read of the inputs of a forward."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_ROWS = 2
"""A single row is a decode step, which reads each weight once and needs none of this."""


def is_plain(x: Tensor) -> bool:
    """Whether these are several rows that C code may read, and nobody wants a graph of it."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


def is_prompt(x: Tensor) -> bool:
    """The same, for several tokens of each sample: single ones may run on chosen neurons."""
    return is_plain(x) and x.dim() == 3 and x.shape[1] >= FEWEST_ROWS
