"""The indexed FFN on CPUs, and single linear layers, compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corematching.backends.cpu.native.library import (
    ACTIVATION_CODES,
    DTYPE_CODES,
    DTYPES,
    INSTALL_HINT,
    MAX_BATCH,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.kernels.check import (
    check_dims,
    check_optional,
    check_tensor,
    describe,
    refuse_order,
)
from corematching.backends.kernels.interface import NeuronSets, Thresholds
from corematching.errors import InvalidTensorError
from corematching.model.ffn_weights import ACTIVATIONS, FFNWeights


def why_unsupported_matrix(weight: Tensor) -> str | None:
    """Why the kernels cannot read this matrix row by row; None if they can."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device}"
    if weight.dtype not in DTYPES:
        return f"it is {weight.dtype}".replace("torch.", "")
    return None if weight.is_contiguous() else "its rows are not contiguous"


class Plan:
    """The neurons of one choice, laid out for batches of every size that comes.

    What a size has been laid out for stays as it is, so that threads can share a plan.

    Attributes
    ----------
    rows_read : Tensor
        (3,) long, rows of gate, up and down read so far, for the choices before as well.

    Raises
    ------
    InvalidTensorError
        The weights, the bias or the thresholds are of other shapes or dtypes, or not contiguous.
    """

    def __init__(
        self,
        weights: FFNWeights,
        sets: NeuronSets | None,
        down: Tensor,
        bias: Tensor | None,
        previous: Plan | None = None,
    ) -> None:
        self.weights, self.sets, self.down, self.bias = weights, sets, down, bias
        self._check()
        with torch.inference_mode(False):
            fresh = torch.zeros(3, dtype=torch.long)
        self.rows_read: Tensor = fresh if previous is None else previous.rows_read
        self._structs: dict[int, Any] = {}
        self._kept: list[Tensor | None] = []

    @property
    def hidden(self) -> int:
        """d."""
        return self.weights.up.shape[1]

    def fit(self, batch: int) -> Any:
        """The `Ffn` struct for ``batch`` rows, which is not to be changed.

        Raises
        ------
        InvalidTensorError
            So many rows cannot be computed, or the indices do not ascend in [0, F).
        """
        struct = self._structs.get(batch)
        if struct is None:
            struct = self._structs[batch] = self._lay_out(batch)
        return struct

    def bytes_read(self) -> int:
        """Bytes of weights read so far, for the choices before as well."""
        row = self.weights.up.shape[1] * self.weights.up.element_size()
        return int(sum(self.rows_read.tolist())) * row

    def _check(self) -> None:
        weights, dtype = self.weights, self.weights.up.dtype
        check_dims("up", weights.up, 2)
        width, hidden = weights.up.shape
        check_tensor("up", weights.up, (width, hidden), *DTYPES)
        check_optional("gate", weights.gate, (width, hidden), dtype)
        for name in ("up_bias", "gate_bias"):
            check_optional(name, getattr(weights, name), (width,), dtype)
        by_neuron = self.down is weights.down_t
        check_tensor("down", self.down, (width, hidden) if by_neuron else (hidden, width), dtype)
        biases = 1 if self.bias is None else self.bias.numel() // hidden
        check_optional("the bias", self.bias, (biases, hidden), dtype)
        if weights.activation not in ACTIVATION_CODES or not width * hidden * biases:
            raise InvalidTensorError(
                f"an FFN with up {describe(weights.up)}, {biases} biases and the activation "
                f"'{weights.activation}' cannot be computed: nothing may be empty, and the "
                f"activation must be one of {', '.join(ACTIVATION_CODES)}"
            )
        if self.sets is None:
            return
        check_dims("indices", self.sets.indices, 2)
        count = len(self.sets.indices)
        check_tensor("indices", self.sets.indices, (count, self.sets.indices.shape[-1]), torch.long)
        for name, limits in vars(self.sets.thresholds).items():
            check_optional(f"the {name} thresholds", limits, (count,), torch.float32)

    def _lay_out(self, batch: int) -> Any:
        weights, sets, bias = self.weights, self.sets, self.bias
        count, biases = 1 if sets is None else len(sets.indices), 1 if bias is None else len(bias)
        if not 0 < batch <= MAX_BATCH or not count or batch % count or batch % biases:
            raise InvalidTensorError(
                f"{batch} rows cannot share {count} sets of neurons and {biases} biases: pass 1 to "
                f"{MAX_BATCH} rows, a multiple of both"
            )
        width = weights.up.shape[0]
        struct = compiled.Ffn().set(
            up=address(weights.up),
            gate=address(weights.gate),
            up_bias=address(weights.up_bias),
            gate_bias=address(weights.gate_bias),
            down=address(self.down),
            bias=address(bias),
            rows_read=address(self.rows_read),
            width=width,
            count=width,
            biases=biases,
            activation=ACTIVATION_CODES[weights.activation],
            by_neuron=self.down is weights.down_t,
        )
        if sets is not None:
            self._unite(struct, sets, batch)
        return struct

    def _unite(self, struct: Any, sets: NeuronSets, batch: int) -> None:
        """List the neurons that some row computes, each with the rows that do."""
        kernels, width = find_kernels(), struct.width
        count, size = sets.indices.shape
        neurons, members, marks = torch.zeros(3, width, dtype=torch.int32).unbind()
        found = kernels.unite(
            sets.indices.data_ptr(), count, size, batch // count, width,
            neurons.data_ptr(), members.data_ptr(), marks.data_ptr(),
        )  # fmt: skip
        if found < 0:
            raise refuse_order(width)
        limits = _expand(sets.thresholds, batch)
        names = ("input_threshold", "gate_threshold", "output_threshold")
        struct.set(
            count=found,
            neurons=neurons.data_ptr(),
            members=members.data_ptr() if count > 1 else None,
            **dict(zip(names, map(address, limits), strict=True)),
        )
        self._kept += [neurons, members, *limits]


class NativeKernel:
    """The indexed FFN in compiled code, for float32 and bfloat16 weights on a CPU."""

    name = "native"
    traceable = False
    max_batch = MAX_BATCH

    def why_unsupported(self, weights: FFNWeights) -> str | None:
        """Why the kernels cannot run on these weights, in a few words; None if they can."""
        if weights.activation not in ACTIVATIONS:
            return f"it does not know the activation '{weights.activation}'"
        matrices = [weights.up, weights.down_t]
        if weights.gate is not None:
            matrices.append(weights.gate)
        reasons = (why_unsupported_matrix(weight) for weight in matrices)
        reason = next((reason for reason in reasons if reason), None)
        if reason is None and find_kernels() is None:
            return f"there are no compiled kernels: {INSTALL_HINT}"
        return reason

    def prepare(self, weights: FFNWeights, sets: NeuronSets, previous: Plan | None = None) -> Plan:
        """Take a choice; the lists are made for the first batch."""
        indices = sets.indices.contiguous()
        sets = NeuronSets(indices, sets.bias, sets.thresholds)
        return Plan(weights, sets, weights.down_t, sets.bias, previous)

    def prepare_dense(
        self, weights: FFNWeights, down: Tensor, bias: Tensor | None, previous: Plan | None = None
    ) -> Plan:
        """All neurons; ``down`` is the down projection's weight, (d, F), in either layout."""
        down = down if down.is_contiguous() else weights.down_t
        return Plan(weights, None, down, bias, previous)

    def run(self, x: Tensor, weights: FFNWeights, prepared: Plan) -> Tensor:
        """One decode step: (B, d) to (B, d), B up to `MAX_BATCH`.

        Raises
        ------
        InvalidTensorError
            x is not such, or not of the weights' dtype.
        """
        kernels = find_kernels()
        check_dims("x", x, 2)
        x, hidden = x.contiguous(), prepared.hidden
        batch = len(x)
        check_tensor("x", x, (batch, hidden), prepared.weights.up.dtype)
        ffn, threads, out = prepared.fit(batch), torch.get_num_threads(), torch.empty_like(x)
        size = kernels.ffn_scratch(batch, hidden, ffn.width, threads)
        scratch = torch.empty(size, dtype=torch.float32)
        call = compiled.FfnCall().set(
            ffn=ffn, x=x.data_ptr(), out=out.data_ptr(), scratch=scratch.data_ptr(), batch=batch,
            hidden=hidden, threads=threads, dtype=DTYPE_CODES[x.dtype],
        )  # fmt: skip
        kernels.ffn(call)
        return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, inputs) to (B, outputs), B up to `MAX_BATCH`, reading each row of the weight once.

    Raises
    ------
    InvalidTensorError
        The three are of different sizes or dtypes, not contiguous, or x has too many rows.
    """
    kernels = find_kernels()
    x = x.contiguous()
    check_dims("the weight", weight, 2)
    check_dims("x", x, 2)
    batch, (outputs, inputs) = len(x), weight.shape
    check_tensor("the weight", weight, (outputs, inputs), *DTYPES)
    check_optional("the bias", bias, (outputs,), weight.dtype)
    check_tensor("x", x, (batch, inputs), weight.dtype)
    if not 0 < batch <= MAX_BATCH or not inputs * outputs:
        raise InvalidTensorError(
            f"{batch} rows times a matrix {(outputs, inputs)} is not for this kernel: pass 1 to "
            f"{MAX_BATCH} rows, and no empty matrix"
        )
    out = torch.empty(batch, outputs, dtype=x.dtype)
    scratch = torch.empty(batch * (inputs + outputs), dtype=torch.float32)
    call = compiled.LinearCall().set(
        weight=weight.data_ptr(), bias=address(bias), x=x.data_ptr(), out=out.data_ptr(),
        scratch=scratch.data_ptr(), batch=batch, inputs=inputs, outputs=outputs,
        threads=torch.get_num_threads(), dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    kernels.linear(call)
    return out


def _expand(thresholds: Thresholds, batch: int) -> tuple[Tensor | None, ...]:
    """Input, gate and output thresholds, one for each of ``batch`` rows."""
    every = (thresholds.input, thresholds.gate, thresholds.output)
    return tuple(
        None if t is None else t.float().repeat_interleave(batch // t.shape[0]).contiguous()
        for t in every
    )


KERNEL = NativeKernel()
