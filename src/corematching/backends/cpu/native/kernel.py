"""The indexed FFN on CPUs, and single linear layers, in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.structs import ACTIVATION_NUMBERS, MAX_BATCH, FFNStruct
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

DTYPES = (torch.float32, torch.bfloat16)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


def refuse_matrix(weight: Tensor) -> str | None:
    """Why the C code cannot read this matrix row by row; None if it can."""
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
        self._structs: dict[int, FFNStruct] = {}
        self._kept: list[Tensor | None] = []

    @property
    def hidden(self) -> int:
        """d."""
        return self.weights.up.shape[1]

    def fit(self, batch: int) -> FFNStruct:
        """The struct for ``batch`` rows, which is not to be changed.

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
        if weights.activation not in ACTIVATION_NUMBERS or not width * hidden * biases:
            raise InvalidTensorError(
                f"an FFN with up {describe(weights.up)}, {biases} biases and the activation "
                f"'{weights.activation}' cannot be computed: nothing may be empty, and the "
                f"activation must be one of {', '.join(ACTIVATION_NUMBERS)}"
            )
        if self.sets is None:
            return
        check_dims("indices", self.sets.indices, 2)
        count = len(self.sets.indices)
        check_tensor("indices", self.sets.indices, (count, self.sets.indices.shape[-1]), torch.long)
        for name, limits in vars(self.sets.thresholds).items():
            check_optional(f"the {name} thresholds", limits, (count,), torch.float32)

    def _lay_out(self, batch: int) -> FFNStruct:
        weights, sets, bias = self.weights, self.sets, self.bias
        count, biases = 1 if sets is None else len(sets.indices), 1 if bias is None else len(bias)
        if not 0 < batch <= MAX_BATCH or not count or batch % count or batch % biases:
            raise InvalidTensorError(
                f"{batch} rows cannot share {count} sets of neurons and {biases} biases: pass 1 to "
                f"{MAX_BATCH} rows, a multiple of both"
            )
        width = weights.up.shape[0]
        struct = FFNStruct(
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
            activation=ACTIVATION_NUMBERS[weights.activation],
            by_neuron=int(self.down is weights.down_t),
        )
        if sets is not None:
            self._unite(struct, sets, batch)
        return struct

    def _unite(self, struct: FFNStruct, sets: NeuronSets, batch: int) -> None:
        """List the neurons that some row computes, each with the rows that do."""
        library, width = find_library(), struct.width
        assert library is not None
        count, size = sets.indices.shape
        rows, members, marks = torch.zeros(3, width, dtype=torch.int32).unbind()
        struct.count = library.cm_unite(
            sets.indices.data_ptr(), count, size, batch // count, width,
            rows.data_ptr(), members.data_ptr(), marks.data_ptr(),
        )  # fmt: skip
        if struct.count < 0:
            raise refuse_order(width)
        struct.rows = rows.data_ptr()
        struct.members = members.data_ptr() if count > 1 else None
        limits = _expand(sets.thresholds, batch)
        struct.input_threshold, struct.gate_threshold, struct.output_threshold = map(
            address, limits
        )
        self._kept += [rows, members, *limits]


class NativeKernel:
    """The indexed FFN in C, for float32 and bfloat16 weights on a CPU."""

    name = "native"
    traceable = False
    max_batch = MAX_BATCH

    def refuse(self, weights: FFNWeights) -> str | None:
        """Why the C code cannot run on these weights, in a few words; None if it can."""
        if weights.activation not in ACTIVATIONS:
            return f"it does not know the activation '{weights.activation}'"
        matrices = [weights.up, weights.down_t]
        if weights.gate is not None:
            matrices.append(weights.gate)
        reasons = (refuse_matrix(weight) for weight in matrices)
        reason = next((reason for reason in reasons if reason), None)
        if reason is None and find_library() is None:
            return "there is no compiled library"
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
        library = find_library()
        assert library is not None
        check_dims("x", x, 2)
        x, hidden = x.contiguous(), prepared.hidden
        batch = len(x)
        check_tensor("x", x, (batch, hidden), prepared.weights.up.dtype)
        struct, threads, out = prepared.fit(batch), torch.get_num_threads(), torch.empty_like(x)
        size = library.cm_ffn_scratch(batch, hidden, struct.width, threads)
        scratch = torch.empty(size, dtype=torch.float32)
        library.cm_ffn(
            ctypes.byref(struct), x.data_ptr(), out.data_ptr(), batch, hidden, threads,
            scratch.data_ptr(), int(x.dtype == torch.bfloat16),
        )  # fmt: skip
        return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, inputs) to (B, outputs), B up to `MAX_BATCH`, reading each row of the weight once.

    Raises
    ------
    InvalidTensorError
        The three are of different sizes or dtypes, not contiguous, or x has too many rows.
    """
    library = find_library()
    assert library is not None
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
    library.cm_linear(
        weight.data_ptr(), address(bias), x.data_ptr(), out.data_ptr(), batch, inputs, outputs,
        torch.get_num_threads(), scratch.data_ptr(), int(x.dtype == torch.bfloat16),
    )  # fmt: skip
    return out


def _expand(thresholds: Thresholds, batch: int) -> tuple[Tensor | None, ...]:
    """Input, gate and output thresholds, one for each of ``batch`` rows."""
    every = (thresholds.input, thresholds.gate, thresholds.output)
    return tuple(
        None if t is None else t.float().repeat_interleave(batch // t.shape[0]).contiguous()
        for t in every
    )


KERNEL = NativeKernel()
