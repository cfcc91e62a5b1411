"""Products of whole prompts on a CPU's matrix tiles."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .build import find_library
from .kernel import address
from .structs import ACTIVATION_NUMBERS

LINE = 64
STEP = 32
"""Inputs and outputs of a matrix come in multiples of this."""


@functools.lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether there are kernels, and a processor with matrix tiles that this process may use."""
    library = find_library()
    return library is not None and bool(library.cm_has_tiles())


def refuse_tiles(weight: Tensor) -> str | None:
    """Why this matrix, (outputs, inputs), cannot be multiplied on tiles; None if it can."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"it is {weight.dtype}".replace("torch.", "")
    if weight.shape[0] % STEP or weight.shape[1] % STEP:
        return f"its shape {tuple(weight.shape)} is no multiple of {STEP}"
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        return "its rows are not contiguous"
    return None if has_tiles() else "there are no matrix tiles"


class TileProducts:
    """Multiplies the rows of prompts with matrices that `refuse_tiles` does not refuse.

    Sums are fp32 and are rounded once, so that a row's result does not depend on the other rows.
    Holds the scratch memory: one thread at a time.
    """

    def __init__(self) -> None:
        self._library = find_library() if has_tiles() else None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """(..., inputs) to (..., outputs), for a weight stored in either order.

        ``residual``, of the output's shape, is added to the rounded result.
        """
        residual = None if residual is None else residual.contiguous()
        return self._multiply(x, weight, None, bias, None, 0, residual)

    def gated(
        self,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        """``act(gate(x)) * up(x)``: (..., d) to (..., F); gate and up are (F, d), contiguous.

        The gate, its activation, up and the product are rounded as PyTorch's operators round them.
        """
        return self._multiply(x, up, gate, up_bias, gate_bias, ACTIVATION_NUMBERS[activation])

    def several(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Tensor:
        """(..., inputs) to (..., sum of the outputs): up to 4 contiguous matrices at once."""
        assert self._library is not None
        x = x.contiguous()
        rows, inputs, count = x.numel() // x.shape[-1], x.shape[-1], len(weights)
        sizes = [weight.shape[0] for weight in weights]
        out = torch.empty(*x.shape[:-1], sum(sizes), dtype=x.dtype)
        pointers, threads = ctypes.c_void_p * count, torch.get_num_threads()
        self._library.cm_multiply_several(
            pointers(*map(address, weights)), pointers(*map(address, biases)),
            (ctypes.c_int64 * count)(*sizes), count, x.data_ptr(), out.data_ptr(), rows, inputs,
            threads, self._scratch(rows, inputs, threads),
        )  # fmt: skip
        return out

    def _multiply(
        self,
        x: Tensor,
        up: Tensor,
        gate: Tensor | None,
        up_bias: Tensor | None,
        gate_bias: Tensor | None,
        activation: int,
        residual: Tensor | None = None,
    ) -> Tensor:
        assert self._library is not None
        x = x.contiguous()
        outputs, inputs = up.shape
        rows, threads = x.numel() // inputs, torch.get_num_threads()
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        self._library.cm_multiply(
            up.data_ptr(), address(gate), address(up_bias), address(gate_bias), x.data_ptr(),
            address(residual), out.data_ptr(), rows, inputs, outputs, activation,
            not up.is_contiguous(), threads, self._scratch(rows, inputs, threads),
        )  # fmt: skip
        return out

    def _scratch(self, rows: int, inputs: int, threads: int) -> int:
        """The address of enough scratch memory, on a cache line."""
        assert self._library is not None
        size = 4 * self._library.cm_multiply_scratch(rows, inputs, threads) + LINE
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return (self._memory.data_ptr() + LINE - 1) // LINE * LINE


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Llama's RMSNorm of every row: (..., d) to (..., d), float32 or bfloat16."""
    library = find_library()
    assert library is not None
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.cm_normalise(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, epsilon,
        torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotary embedding, in place, of the first heads of x, (B, T, H, D), contiguous.

    Cosines and sines are (B or 1, T, D).
    """
    library = find_library()
    assert library is not None
    batch, length, total, size = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    library.cm_rotate(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), batch * length, total * size, heads, size,
        cos.shape[0] * length, torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
