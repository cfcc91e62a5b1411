"""What the Triton kernels for prompts have in common: tensors that they can read, rows of them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from corematching.backends.cuda.triton_programs import INTERPRETED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {2: torch.int16, 4: torch.int32}
WIDEST = 1 << 15
"""The widest row that one program holds."""
TINY = tl.constexpr(1e-24)
LOWEST = tl.constexpr(-(1 << 31))


def is_readable(values: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a kernel can read a tensor: contiguous, of one of these dtypes, on a GPU."""
    return values.dtype in dtypes and values.is_contiguous() and is_reachable(values)


def is_reachable(values: Tensor) -> bool:
    """Whether a tensor has numbers, and lies on a GPU or before Triton's interpreter."""
    return values.numel() > 0 and (values.is_cuda or INTERPRETED)


def as_bytes(values: Tensor) -> Tensor:
    """Masks as bytes; anything else as it is."""
    return values.view(torch.uint8) if values.dtype == torch.bool else values


def as_bits(values: Tensor) -> Tensor:
    """Floats as the integers of the same bits."""
    return values.view(INTEGERS[values.element_size()])


def size_row(width: int) -> dict[str, int]:
    """Block size and warps of a program for one row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 1024))}


def on_device(values: Tensor) -> Any:
    """A context in which kernels start on the tensor's device."""
    return torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext()
