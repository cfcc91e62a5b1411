"""The indexed FFN on CPUs, and single linear layers, in C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from corematching.kernels.interface import ACTIVATIONS, FFNWeights, NeuronSets, Thresholds

from .build import find_library
from .structs import ACTIVATION_NUMBERS, MAX_BATCH, FFNStruct

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
    """The neurons of one choice, laid out for batches of one size at a time.

    Attributes
    ----------
    struct : FFNStruct
        What the C code gets.
    rows_read : Tensor
        (3,) long, rows of gate, up and down read so far, for the choices before as well.
    """

    def __init__(
        self,
        weights: FFNWeights,
        sets: NeuronSets | None,
        down: Tensor,
        previous: Plan | None = None,
    ) -> None:
        self.weights, self.sets, self.down = weights, sets, down
        with torch.inference_mode(False):
            fresh = torch.zeros(3, dtype=torch.long)
        self.rows_read: Tensor = fresh if previous is None else previous.rows_read
        self.batch = 0
        self._kept: tuple[Tensor | None, ...] = ()
        width = weights.up.shape[0]
        self.struct = FFNStruct(
            up=address(weights.up),
            gate=address(weights.gate),
            up_bias=address(weights.up_bias),
            gate_bias=address(weights.gate_bias),
            down=address(down),
            rows_read=address(self.rows_read),
            width=width,
            count=width,
            activation=ACTIVATION_NUMBERS[weights.activation],
            by_neuron=int(down is weights.down_t),
        )
        self.set_bias(None if sets is None else sets.bias)

    def set_bias(self, bias: Tensor | None) -> None:
        """(C, d), what is added to the output."""
        self.bias = bias
        self.struct.bias = address(bias)
        self.struct.biases = 1 if bias is None else bias.shape[0]

    def fit(self, batch: int) -> FFNStruct:
        """The struct for ``batch`` rows."""
        if batch != self.batch and self.sets is not None:
            self._unite(self.sets, batch)
        self.batch = batch
        return self.struct

    def bytes_read(self) -> int:
        """Bytes of weights read so far, for the choices before as well."""
        row = self.weights.up.shape[1] * self.weights.up.element_size()
        return int(sum(self.rows_read.tolist())) * row

    def _unite(self, sets: NeuronSets, batch: int) -> None:
        """List the neurons that some row computes, each with the rows that do."""
        library = find_library()
        assert library is not None
        struct, width = self.struct, self.struct.width
        count = sets.indices.shape[0]
        indices = sets.indices.contiguous()
        rows, members, marks = torch.zeros(3, width, dtype=torch.int32).unbind()
        size = indices.shape[1]
        struct.count = library.cm_unite(
            indices.data_ptr(), count, size, batch // count, width,
            rows.data_ptr(), members.data_ptr(), marks.data_ptr(),
        )  # fmt: skip
        struct.rows = rows.data_ptr()
        struct.members = members.data_ptr() if count > 1 else None
        limits = _expand(sets.thresholds, batch)
        struct.input_threshold, struct.gate_threshold, struct.output_threshold = map(
            address, limits
        )
        self._kept = (rows, members, *limits)


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
        return Plan(weights, sets, weights.down_t, previous)

    def prepare_dense(
        self, weights: FFNWeights, down: Tensor, bias: Tensor | None, previous: Plan | None = None
    ) -> Plan:
        """All neurons; ``down`` is the down projection's weight, (d, F), in either layout."""
        plan = Plan(weights, None, down if down.is_contiguous() else weights.down_t, previous)
        plan.set_bias(bias)
        return plan

    def run(self, x: Tensor, weights: FFNWeights, prepared: Plan) -> Tensor:
        """One decode step: (B, d) to (B, d), B up to `MAX_BATCH`."""
        library = find_library()
        assert library is not None
        x = x.contiguous()
        batch, hidden = x.shape
        struct, threads, out = prepared.fit(batch), torch.get_num_threads(), torch.empty_like(x)
        size = library.cm_ffn_scratch(batch, hidden, struct.width, threads)
        scratch = torch.empty(size, dtype=torch.float32)
        library.cm_ffn(
            ctypes.byref(struct), x.data_ptr(), out.data_ptr(), batch, hidden, threads,
            scratch.data_ptr(), int(x.dtype == torch.bfloat16),
        )  # fmt: skip
        return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, inputs) to (B, outputs), B up to `MAX_BATCH`, reading each row of the weight once."""
    library = find_library()
    assert library is not None
    x = x.contiguous()
    batch, (outputs, inputs) = x.shape[0], weight.shape
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
