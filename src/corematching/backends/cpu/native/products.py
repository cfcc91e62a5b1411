"""Products of whole prompts on a CPU's matrix tiles or on its vectors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.kernel import address, refuse_matrix
from corematching.backends.cpu.native.rows import Norm, check_norm, check_rows, normalise
from corematching.backends.cpu.native.structs import (
    ACTIVATION_NUMBERS,
    NO_ACTIVATION,
    integers,
    pointers,
)
from corematching.backends.kernels.check import check_optional, check_tensor, describe
from corematching.devices import multiplies
from corematching.errors import InvalidTensorError

LINE = 64
STEP = 32
"""Inputs and outputs of a matrix on tiles come in multiples of this."""
MOST_PRODUCTS = 4
"""Matrices that are multiplied with the same rows at once."""
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
    if weight.ndim != 2 or not weight.numel():
        return f"its shape is {tuple(weight.shape)}"
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


class Scratch(threading.local):
    """Memory that grows as needed and is kept, for every thread its own."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> int:
        """Where the first cache line begins, with ``size`` bytes of memory from there on."""
        if self._memory.numel() < size + LINE:
            self._memory = torch.empty(size + LINE, dtype=torch.uint8)
        return (self._memory.data_ptr() + LINE - 1) // LINE * LINE


class Products:
    """Multiplies the rows of prompts with matrices that `refuse_product` does not refuse.

    Sums are fp32 and are rounded once, so that a row's result does not depend on the other rows.
    Its methods raise an InvalidTensorError where something is of another shape, dtype or layout.

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
        if not weight.is_contiguous() and (activation is not None or norm is not None):
            raise InvalidTensorError(
                "a weight stored by input goes with no activation and no norm: store it by output"
            )
        residual = None if residual is None else residual.contiguous()
        _check_activation(activation)
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
        _check_activation(activation)
        check_tensor("gate", gate, tuple(up.shape), x.dtype)
        check_tensor("up", up, tuple(up.shape), x.dtype)
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
        inputs, count = x.shape[-1], len(weights)
        if not 0 < count <= MOST_PRODUCTS or len(biases) != count:
            raise InvalidTensorError(
                f"{count} matrices with {len(biases)} biases: pass 1 to {MOST_PRODUCTS} of both"
            )
        for weight, bias in zip(weights, biases, strict=True):
            check_tensor("a weight", weight, (weight.shape[0], inputs), x.dtype)
            self._check_matrix(weight)
            check_optional("a bias", bias, (weight.shape[0],), x.dtype)
        sizes = [weight.shape[0] for weight in weights]
        out = torch.empty(*x.shape[:-1], sum(sizes), dtype=x.dtype)
        rows = x.numel() // inputs
        if not rows:
            return out
        x, norm = self._normalise_first(check_rows(x), norm)
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
        self._check_matrix(up)
        outputs, inputs = up.shape
        rows, threads = x.numel() // inputs, torch.get_num_threads()
        check_optional("the bias", up_bias, (outputs,), up.dtype)
        check_optional("the gate's bias", gate_bias, (outputs,), up.dtype)
        check_optional("the residual", residual, (*x.shape[:-1], outputs), up.dtype)
        check_kept(kept, rows, outputs, up.dtype)
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        if x.shape[-1:] != (inputs,) or x.dtype != up.dtype:
            raise _refuse_factors(x, up)
        if not rows:
            return out
        x, norm = self._normalise_first(check_rows(x), norm)
        self._library.cm_multiply(
            up.data_ptr(), address(gate), address(up_bias), address(gate_bias), x.data_ptr(),
            address(residual), out.data_ptr(), rows, inputs, outputs, activation,
            not up.is_contiguous(), *map(address, kept or (None, None)),
            *_describe(norm), threads, *self._how(x, rows, threads),
        )  # fmt: skip
        return out

    def _normalise_first(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
        """What to multiply, and the norm that the product itself applies."""
        if norm is not None:
            check_norm(x, norm)
        if norm is None or self.unit == TILES:
            return x, norm
        return normalise(x, norm), None

    def _check_matrix(self, weight: Tensor) -> None:
        """Refuse a matrix, (outputs, inputs), that the unit cannot multiply."""
        reason = refuse_product(weight, self.unit)
        if reason is not None:
            raise InvalidTensorError(
                f"a matrix {describe(weight)} cannot be multiplied on {self.unit}: {reason}"
            )

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


def check_kept(
    kept: tuple[Tensor, Tensor] | None, rows: int, width: int, dtype: torch.dtype
) -> None:
    """Refuse places and room for gates that do not fit so many rows of so many outputs."""
    if kept is None:
        return
    places, gates = kept
    check_tensor("the places", places, (rows,), torch.int32)
    check_tensor("the room for gates", gates, (*gates.shape[:-1], width), dtype)
    room = gates.numel() // width
    if rows and int(places.max()) >= room:
        raise InvalidTensorError(
            f"a gate is to be kept in row {int(places.max())} of {room}: give places below that"
        )


def _check_activation(name: str | None) -> None:
    if name is not None and name not in ACTIVATION_NUMBERS:
        known = ", ".join(ACTIVATION_NUMBERS)
        raise InvalidTensorError(f"unknown activation '{name}': known: {known}")


def _refuse_factors(x: Tensor, weight: Tensor) -> InvalidTensorError:
    return InvalidTensorError(
        f"x, {describe(x)}, cannot be multiplied with a matrix {describe(weight)}: their inputs "
        "and their dtypes must be the same"
    )
