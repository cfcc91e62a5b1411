"""Matrix products of whole prompts, with norm, bias, activation and residual fused in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corematching.backends.cpu.native.kernel import why_unsupported_matrix
from corematching.backends.cpu.native.library import (
    ACTIVATION_CODES,
    DTYPE_CODES,
    INSTALL_HINT,
    MAX_GEMMS,
    NO_ACTIVATION,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.cpu.native.rows import Norm, check_norm, check_rows
from corematching.backends.cpu.native.scratch import Scratch
from corematching.backends.kernels.check import check_optional, check_tensor, describe
from corematching.errors import InvalidTensorError


def why_unsupported_gemm(weight: Tensor) -> str | None:
    """Why the kernels cannot multiply with this matrix, (outputs, inputs); None if they can.

    It may be stored by output or by input.
    """
    if weight.ndim != 2 or not weight.numel():
        return f"its shape is {tuple(weight.shape)}"
    reason = why_unsupported_matrix(weight if weight.is_contiguous() else weight.t())
    if reason is None and find_kernels() is None:
        return f"there are no compiled kernels: {INSTALL_HINT}"
    return reason


class Gemm:
    """Multiplies the rows of prompts with matrices that `why_unsupported_gemm` finds no fault with.

    Sums are float32 and are rounded once, so that a row's result does not depend on the other rows.
    Its methods raise an InvalidTensorError where something is of another shape, dtype or layout.

    Parameters
    ----------
    scratch : Scratch, optional
        Memory to work in, which other kernels may share.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self._scratch = Scratch() if scratch is None else scratch

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

        With a ``norm``, x is normalized first; the rounded result may go through an activation;
        both only if the weight is stored by output. ``residual``, of the output's shape, is added
        to what is then rounded again.
        """
        if not weight.is_contiguous() and (activation is not None or norm is not None):
            raise InvalidTensorError(
                "a weight stored by input goes with no activation and no norm: store it by output"
            )
        if activation is not None:
            check_activation(activation)
        residual = None if residual is None else residual.contiguous()
        rows, outputs = _check_gemm(x, weight, bias)
        check_optional("the residual", residual, (*x.shape[:-1], outputs), weight.dtype)
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        if rows:
            code = NO_ACTIVATION if activation is None else ACTIVATION_CODES[activation]
            x, call = _describe(x, weight, bias, norm)
            call.set(
                out=out.data_ptr(), out_stride=outputs, residual=address(residual),
                activation=code, by_input=not weight.is_contiguous(),
            )  # fmt: skip
            self._run([call])
        return out

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
        ``kept`` are slots, int32, one for each row of x, and a tensor (n, F) in whose row of that
        number the row's ``act(gate(x))`` is put; -1 for a row that is not wanted.
        With a ``norm``, x is normalized first.
        """
        check_activation(activation)
        check_tensor("gate", gate, tuple(up.shape), x.dtype)
        check_tensor("up", up, tuple(up.shape), x.dtype)
        rows, outputs = _check_gemm(x, up, up_bias)
        check_optional("the gate's bias", gate_bias, (outputs,), up.dtype)
        check_kept(kept, rows, outputs, up.dtype)
        out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        if rows:
            slots, gates = kept or (None, None)
            x, call = _describe(x, up, up_bias, norm)
            call.set(
                out=out.data_ptr(), out_stride=outputs, gate=gate.data_ptr(),
                gate_bias=address(gate_bias), gate_slots=address(slots), kept_gates=address(gates),
                activation=ACTIVATION_CODES[activation],
            )  # fmt: skip
            self._run([call])
        return out

    def joint(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm: Norm | None = None,
    ) -> Tensor:
        """(..., inputs) to (..., sum of the outputs): up to 4 contiguous matrices at once.

        With a ``norm``, x is normalized first.
        """
        count = len(weights)
        if not 0 < count <= MAX_GEMMS or len(biases) != count:
            raise InvalidTensorError(
                f"{count} matrices with {len(biases)} biases: pass 1 to {MAX_GEMMS} of both"
            )
        rows = 0
        for weight, bias in zip(weights, biases, strict=True):
            check_tensor("a weight", weight, (weight.shape[0], x.shape[-1]), x.dtype)
            rows, _ = _check_gemm(x, weight, bias)
        total = sum(weight.shape[0] for weight in weights)
        out = torch.empty(*x.shape[:-1], total, dtype=x.dtype)
        if not rows:
            return out
        calls, place = [], out.data_ptr()
        for weight, bias in zip(weights, biases, strict=True):
            x, call = _describe(x, weight, bias, norm)
            calls.append(call.set(out=place, out_stride=total))
            place += weight.shape[0] * out.element_size()
        self._run(calls)
        return out

    def _run(self, calls: list[Any]) -> None:
        kernels = find_kernels()
        need = max(kernels.gemm_scratch(call) for call in calls)
        calls[0].scratch = self._scratch.reserve(need)
        kernels.gemm(calls)


def _check_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Rows and outputs of x times a weight, (outputs, inputs); refuses what does not fit."""
    reason = why_unsupported_gemm(weight)
    if reason is not None:
        raise InvalidTensorError(f"a matrix {describe(weight)} cannot be multiplied: {reason}")
    outputs, inputs = weight.shape
    if x.shape[-1:] != (inputs,) or x.dtype != weight.dtype:
        raise InvalidTensorError(
            f"x, {describe(x)}, cannot be multiplied with a matrix {describe(weight)}: their "
            "inputs and their dtypes must be the same"
        )
    check_optional("the bias", bias, (outputs,), weight.dtype)
    return x.numel() // inputs, outputs


def _describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None
) -> tuple[Tensor, Any]:
    """x as it is read, and the struct of its product without what it goes to."""
    x = check_rows(x)
    call = compiled.Gemm().set(
        x=x.data_ptr(), weight=weight.data_ptr(), bias=address(bias),
        rows=x.numel() // x.shape[-1], inputs=x.shape[-1], outputs=weight.shape[0],
        threads=torch.get_num_threads(), activation=NO_ACTIVATION, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    if norm is not None:
        check_norm(x, norm)
        call.set(norm=norm.weight.data_ptr(), norm_bias=address(norm.bias), epsilon=norm.epsilon)
    return x, call


def check_kept(
    kept: tuple[Tensor, Tensor] | None, rows: int, width: int, dtype: torch.dtype
) -> None:
    """Refuse slots and room for gates that do not fit so many rows of so many outputs."""
    if kept is None:
        return
    slots, gates = kept
    check_tensor("the slots", slots, (rows,), torch.int32)
    check_tensor("the room for gates", gates, (*gates.shape[:-1], width), dtype)
    room = gates.numel() // width
    if rows and int(slots.max()) >= room:
        raise InvalidTensorError(
            f"a gate is to be kept in slot {int(slots.max())} of {room}: give slots below that"
        )


def check_activation(name: str) -> None:
    """Refuse an activation that the kernels do not know."""
    if name not in ACTIVATION_CODES:
        known = ", ".join(ACTIVATION_CODES)
        raise InvalidTensorError(f"unknown activation '{name}': known: {known}")
