"""Products of whole prompts on a CPU's matrix tiles or on its vectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from corematching.devices import multiplies

from .build import find_library
from .kernel import address, refuse_matrix
from .structs import ACTIVATION_NUMBERS, NO_ACTIVATION, integers, pointers

LINE = 64
STEP = 32
"""Inputs and outputs of a matrix on tiles come in multiples of this."""
VECTORS, TILES = "vectors", "tiles"
UNIT_NUMBERS = {VECTORS: 0, TILES: 1}


@functools.lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether there are kernels, and a processor with matrix tiles that this process may use."""
    library = find_library()
    return library is not None and bool(library.cm_has_tiles())


def find_unit() -> str | None:
    """What multiplies prompts here: tiles, else vectors where PyTorch's bf16 is slow, else None."""
    if has_tiles():
        return TILES
    return None if find_library() is None or multiplies("cpu", torch.bfloat16) else VECTORS


def list_dtypes(unit: str | None) -> tuple[torch.dtype, ...]:
    """What a unit multiplies faster than PyTorch does: bfloat16, with AVX2 float32 as well.

    Elsewhere float32 products were not measured, and some machines have far faster ones.
    """
    library = find_library()
    if library is None or unit is None:
        return ()
    floats = unit == VECTORS and library.cm_target() == b"avx2"
    return (torch.bfloat16, torch.float32) if floats else (torch.bfloat16,)


def refuse_product(weight: Tensor, unit: str) -> str | None:
    """Why this matrix, (outputs, inputs), cannot be multiplied on a unit; None if it can.

    Parameters
    ----------
    weight : Tensor
        Stored by output or by input.
    unit : str
        ``vectors`` or ``tiles``.
    """
    reason = refuse_matrix(weight if weight.is_contiguous() else weight.t())
    if reason is not None:
        return reason
    if unit == VECTORS:
        return "there is no compiled library" if find_library() is None else None
    if weight.dtype != torch.bfloat16:
        return f"it is {weight.dtype}".replace("torch.", "")
    if weight.shape[0] % STEP or weight.shape[1] % STEP:
        return f"its shape {tuple(weight.shape)} is no multiple of {STEP}"
    return None if has_tiles() else "there are no matrix tiles"


class Norm(NamedTuple):
    """An RMSNorm of Llama's form or, with a shift, PyTorch's LayerNorm.

    Attributes
    ----------
    weight : Tensor
        (d,), of x's dtype.
    epsilon : float
    shift : Tensor or None
        (d,), the LayerNorm's bias.
    """

    weight: Tensor
    epsilon: float
    shift: Tensor | None = None


class Scratch:
    """Memory that grows as needed and is kept, for one thread at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> int:
        """Where the first cache line begins in ``size`` bytes of memory."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return (self._memory.data_ptr() + LINE - 1) // LINE * LINE


class Products:
    """Multiplies the rows of prompts with matrices that `refuse_product` does not refuse.

    Sums are fp32 and are rounded once, so that a row's result does not depend on the other rows.
    Holds the scratch memory: one thread at a time.

    Parameters
    ----------
    unit : str
        ``vectors`` (float32 and bfloat16) or ``tiles`` (bfloat16).
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._number = UNIT_NUMBERS[unit]
        self._library = find_library()
        self._scratch = Scratch()

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        activation: str | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """(..., inputs) to (..., outputs), for a weight stored in either order.

        With a ``norm``, x is normalised first; the rounded result may go through an activation;
        both only if the weight is stored by output. ``residual``, of the output's shape, is added
        to what is then rounded again.
        """
        assert weight.is_contiguous() or (activation is None and norm is None)
        residual = None if residual is None else residual.contiguous()
        number = NO_ACTIVATION if activation is None else ACTIVATION_NUMBERS[activation]
        return self._multiply(x, weight, None, bias, None, number, residual, norm=norm)

    def gated(
        self,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
        kept: tuple[Tensor, Tensor] | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """``act(gate(x)) * up(x)``: (..., d) to (..., F); gate and up are (F, d), contiguous.

        The gate, its activation, up and the product are rounded as PyTorch's operators round them.
        ``kept`` are places, int32, one for each row of x, and a tensor (n, F) in whose row of that
        number the row's ``act(gate(x))`` is put; -1 for a row that is not wanted.
        With a ``norm``, x is normalised first.
        """
        number = ACTIVATION_NUMBERS[activation]
        return self._multiply(x, up, gate, up_bias, gate_bias, number, kept=kept, norm=norm)

    def several(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm: Norm | None = None,
    ) -> Tensor:
        """(..., inputs) to (..., sum of the outputs): up to 4 contiguous matrices at once.

        With a ``norm``, x is normalised first.
        """
        assert self._library is not None
        x, norm = self._normalise_first(x.contiguous(), norm)
        rows, inputs, count = x.numel() // x.shape[-1], x.shape[-1], len(weights)
        sizes = [weight.shape[0] for weight in weights]
        out = torch.empty(*x.shape[:-1], sum(sizes), dtype=x.dtype)
        threads = torch.get_num_threads()
        self._library.cm_multiply_several(
            pointers(*map(address, weights)), pointers(*map(address, biases)),
            integers(*sizes), count, x.data_ptr(), out.data_ptr(), rows, inputs,
            *_describe(norm), threads, *self._how(x, rows, threads),
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
        kept: tuple[Tensor, Tensor] | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        assert self._library is not None
        x, norm = self._normalise_first(x.contiguous(), norm)
        outputs, inputs = up.shape
        rows, threads = x.numel() // inputs, torch.get_num_threads()
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        self._library.cm_multiply(
            up.data_ptr(), address(gate), address(up_bias), address(gate_bias), x.data_ptr(),
            address(residual), out.data_ptr(), rows, inputs, outputs, activation,
            not up.is_contiguous(), *map(address, kept or (None, None)),
            *_describe(norm), threads, *self._how(x, rows, threads),
        )  # fmt: skip
        return out

    def _normalise_first(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
        """What to multiply, and the norm that the product itself applies."""
        if norm is None or self.unit == TILES:
            return x, norm
        return normalise(x, norm), None

    def _how(self, x: Tensor, rows: int, threads: int) -> tuple[int, int, bool]:
        """The address of enough scratch memory, the unit's number, and whether it is bf16."""
        assert self._library is not None
        is_bf16 = x.dtype == torch.bfloat16
        size = self._library.cm_multiply_scratch(rows, x.shape[-1], threads, self._number, is_bf16)
        return self._scratch.reserve(size), self._number, is_bf16


def _describe(norm: Norm | None) -> tuple[int | None, int | None, float]:
    if norm is None:
        return None, None, 0.0
    return norm.weight.data_ptr(), address(norm.shift), norm.epsilon


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """The norm of every row: (..., d) to (..., d), float32 or bfloat16."""
    library = find_library()
    assert library is not None
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.cm_normalise(
        x.data_ptr(), norm.weight.data_ptr(), address(norm.shift), out.data_ptr(),
        x.numel() // width, width, norm.epsilon, torch.get_num_threads(),
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def rotate_apart(x: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, and each where attention and caches want it.

    Parameters
    ----------
    x : Tensor
        (B, T, H + 2G, D), queries, keys and values, contiguous; the queries are rotated in place.
    cos, sin : Tensor
        (B or 1, T, D), of x's dtype.
    groups : int
        G, heads of keys and of values.

    Returns
    -------
    query : Tensor
        (B, H, T, D), in x's memory.
    key, value : Tensor
        (B, G, T, D), contiguous, in memory of their own.
    """
    library = find_library()
    assert library is not None
    batch, length, total, size = x.shape
    heads, cos, sin = total - 2 * groups, cos.contiguous(), sin.contiguous()
    key, value = x.new_empty(2, batch, groups, length, size).unbind()
    library.cm_rotate_apart(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), key.data_ptr(), value.data_ptr(),
        batch, length, heads, groups, size, cos.shape[0] * length,
        torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    return x[:, :, :heads].transpose(1, 2), key, value
