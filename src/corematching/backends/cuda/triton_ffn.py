"""The indexed FFN as Triton kernels, which read the chosen neurons' rows in place.

Three launches, each with a fixed order of summation, so equal inputs give equal bits: the neurons
(gate, up, activation), the down projection split over the neurons, and the sum of the splits with
the bias. Accumulation is in float32 for every weight dtype. Nothing waits for the device, and all
shapes follow from the arguments' shapes: the step can be captured in a CUDA graph, and
``torch.compile(fullgraph=True)`` sees one operator.

A batch with different neurons per sample reads their *union* once, with a membership mask. Decode
is memory-bound: B lists with a ratio p of the neurons would read ``B * p`` of the FFN (3.2 times at
B = 8, p = 0.4). Independent choices have a union of ``1 - (1 - p) ** B`` (0.98), never more than
the dense FFN, and one row serves up to 16 samples in one matrix instruction.

Shapes: B samples, d hidden size, F neurons of the FFN, S sets of K neurons, C biases,
R listed rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from corematching.backends.cuda.triton_programs import (
    BATCH_BLOCK,
    INTERPRETED,
    down_kernel,
    neurons_kernel,
    sum_kernel,
)
from corematching.backends.kernels.interface import NeuronSets
from corematching.errors import ConfigError
from corematching.model.ffn_weights import ACTIVATIONS, FFNWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SPLITS, MAX_SPLITS_OF_A_BATCH = 64, 32
ROWS_PER_SPLIT = 64  # the smallest split of the neurons
INTERPRETED_BLOCKS = {"BLOCK_R": 16, "BLOCK_D": 32} if INTERPRETED else {}


@dataclass(frozen=True)
class Plan:
    """The union of a batch's neurons, with the bias and the thresholds of the choice.

    Attributes
    ----------
    rows : Tensor
        (R,) int32, ascending for several sets; -1 is filler, which reads nothing.
    members : Tensor or None
        (S, R) int8, 1 where a set contains the row; None for a single set.
    bias : Tensor or None
        (C, d), as in `NeuronSets`.
    input, gate, output : Tensor or None
        (S,) float32, as in `Thresholds`.
    """

    rows: Tensor
    members: Tensor | None = None
    bias: Tensor | None = None
    input: Tensor | None = None
    gate: Tensor | None = None
    output: Tensor | None = None


class TritonKernel:
    """An FFN over lists of neurons on a CUDA device; see `corematching.backends.kernels.interface`.

    Attributes
    ----------
    traceable : bool
        ``torch.compile`` takes `run` without a graph break.
    max_batch : int or None
        Any number of rows.
    """

    name = "triton"
    traceable = True
    max_batch: int | None = None

    def why_unsupported(self, weights: FFNWeights) -> str | None:
        """Why the kernel cannot run on these weights, in a few words; None if it can."""
        matrices = [w for w in (weights.up, weights.gate, weights.down_t) if w is not None]
        first = matrices[0]
        if not (first.is_cuda or INTERPRETED):
            return f"weights on '{first.device.type}', not on a CUDA device"
        if any((w.dtype, w.device) != (first.dtype, first.device) for w in matrices):
            return "weights of several dtypes or devices"
        if first.dtype not in DTYPES:
            return f"weights in {first.dtype}"
        if any(w.stride(1) != 1 for w in matrices):
            return "neurons that are no contiguous rows"
        if weights.activation not in ACTIVATIONS:
            return f"activation '{weights.activation}'"
        return None

    def prepare(self, weights: FFNWeights, sets: NeuronSets, previous: Plan | None = None) -> Plan:
        """List the neurons of a choice; does not wait for the device.

        The tensors of ``previous`` are written in place where their shapes match, and the list's
        length is always ``min(F, S * K)``, so a captured graph stays valid from one choice to the
        next. The weights get static addresses: a compiled graph would otherwise copy them at each
        replay.

        Raises
        ------
        ConfigError
            The choice has a gate threshold, but the FFN has no gate.
        """
        if sets.thresholds.gate is not None and weights.gate is None:
            raise ConfigError(
                "a gate threshold needs an FFN with a gate: threshold the output instead"
            )
        for tensor in vars(weights).values():
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor)
        with torch.inference_mode(False), torch.no_grad():
            rows, members = _list_neurons(sets.indices.to(weights.up.device), len(weights.up))
            fresh = Plan(rows, members, sets.bias, **vars(sets.thresholds))
            kept: dict[str, Any] = {
                name: _keep(getattr(previous, name, None), tensor)
                for name, tensor in vars(fresh).items()
            }
        return Plan(**kept)

    def run(self, x: Tensor, weights: FFNWeights, prepared: Plan) -> Tensor:
        """One decode step: (B, d) to (B, d); row b computes set ``b // (B / S)``."""
        if prepared.input is not None:
            least = prepared.input.view(-1, 1, 1)
            groups = x.unflatten(0, (len(prepared.input), -1))
            x = groups.masked_fill(groups.float().abs() < least, 0).flatten(0, 1)
        return _indexed_ffn(
            x, weights.up, weights.gate, weights.down_t, prepared.rows, prepared.members,
            prepared.bias, weights.up_bias, weights.gate_bias, weights.activation,
            prepared.gate, prepared.output,
        )  # fmt: skip


def _list_neurons(indices: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The union's rows (R,) and memberships (S, R) of sets (S, K); -1 pads shorter sets."""
    sets, count = indices.shape
    if sets == 1:
        return indices[0].to(torch.int32), None
    held = torch.zeros(sets, width + 1, dtype=torch.bool, device=indices.device)
    held = held.scatter(1, torch.where(indices < 0, width, indices), True)[:, :width]
    used = held.any(0)
    length = min(width, sets * count)
    slots = torch.where(used, used.cumsum(0) - 1, length)
    rows = torch.full((length + 1,), -1, device=indices.device)
    rows = rows.scatter(0, slots, torch.arange(width, device=indices.device))[:length]
    members = held[:, rows.clamp(min=0)] & (rows >= 0)
    return rows.to(torch.int32), members.to(torch.int8)


def _keep(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The new values, at the old address where shape, dtype and device match."""
    if new is None:
        return None
    if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        return old.copy_(new)
    own = new.clone(memory_format=torch.contiguous_format)
    torch._dynamo.mark_static_address(own)
    return own


@torch.library.custom_op("corematching::indexed_ffn", mutates_args=())
def _indexed_ffn(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down_t: Tensor,
    rows: Tensor,
    members: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    gate_threshold: Tensor | None,
    output_threshold: Tensor | None,
) -> Tensor:
    batch, width = x.shape
    num_rows = rows.shape[0]
    x = x.contiguous()
    block_b = 1 if batch == 1 else BATCH_BLOCK
    batches = triton.cdiv(batch, block_b)
    per_set = next((t for t in (members, gate_threshold, output_threshold) if t is not None), None)
    sets = 1 if per_set is None else per_set.shape[0]
    hidden = torch.empty(batch, num_rows, dtype=x.dtype, device=x.device)
    most = MAX_SPLITS if batch == 1 else MAX_SPLITS_OF_A_BATCH
    splits = max(1, min(most, triton.cdiv(num_rows, ROWS_PER_SPLIT)))
    parts = torch.empty(splits, batch, width, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        neurons_kernel[lambda meta: (triton.cdiv(num_rows, meta["BLOCK_R"]), batches)](
            x, up, gate, rows, members, up_bias, gate_bias, gate_threshold, output_threshold,
            hidden, batch, batch // sets, width, num_rows, up.stride(0),
            up.stride(0) if gate is None else gate.stride(0),
            GATED=gate is not None, ALIVE_FIRST=gate_threshold is not None,
            ACTIVATION=activation, BLOCK_B=block_b, **INTERPRETED_BLOCKS,
        )  # fmt: skip
        down_kernel[lambda meta: (triton.cdiv(width, meta["BLOCK_D"]), splits, batches)](
            hidden, down_t, rows, parts, batch, width, num_rows, triton.cdiv(num_rows, splits),
            down_t.stride(0), GATED=False, ALIVE_FIRST=False, BLOCK_B=block_b, **INTERPRETED_BLOCKS,
        )  # fmt: skip
        sum_kernel[(triton.cdiv(width, 128), batch)](
            parts, bias, out, batch, width, 1 if bias is None else batch // bias.shape[0], splits,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=128,
        )  # fmt: skip
    return out


@_indexed_ffn.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


KERNEL = TritonKernel()
