"""The indexed FFN as Triton kernels: the chosen neurons' rows are read in place, none is copied.

Three launches, each with a fixed order of summation, so equal inputs give equal bits: the neurons
(gate, up, activation), the down projection split over the neurons, and the sum of the splits with
the bias. Accumulation is in float32 whatever the weights' dtype. Nothing waits for the device, all
shapes follow from the arguments' shapes: the step can be captured in a CUDA graph, and
``torch.compile(fullgraph=True)`` sees one operator.

A batch whose samples have different neurons walks their *union* once, with a membership mask. A
decode step is bound by the weights that it reads: walking B lists of a share p of the neurons reads
``B * p`` of the FFN (3.2 of it at B = 8, p = 0.4), the union ``1 - (1 - p) ** B`` at most (0.98),
never more than the dense FFN; and one row serves up to 16 samples in one matrix instruction.

Shapes: B samples, d hidden size, F neurons of the FFN, S sets of K neurons, C biases,
R listed rows.
"""

# ruff: noqa: N803 - Triton's constants are written in capitals

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from corematching.errors import ConfigError
from corematching.kernels.interface import ACTIVATIONS, FFNWeights, NeuronSets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BATCH_BLOCK = 16  # the smallest number of rows of a matrix instruction
MAX_SPLITS, MAX_SPLITS_OF_A_BATCH = 64, 32
ROWS_PER_SPLIT = 64  # a split of the neurons is no smaller than this
INTERPRETED_BLOCKS = {"BLOCK_R": 16, "BLOCK_D": 32} if INTERPRETED else {}
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as integers


def _tune(kernel: Any) -> Any:
    """Let the device choose among a few block sizes, once per shape; the interpreter has none."""
    if INTERPRETED:
        return kernel
    sizes = [
        (16, 128, 4, 3), (16, 256, 4, 3), (32, 128, 4, 4), (32, 256, 8, 3), (64, 64, 4, 4),
        (8, 256, 4, 4), (8, 512, 4, 3),
    ]  # fmt: skip
    configs = [
        triton.Config({"BLOCK_R": rows, "BLOCK_D": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in sizes
    ]
    key = ["width", "num_rows", "BLOCK_B", "GATED", "ALIVE_FIRST"]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _list_fitting})(
        kernel
    )


def _list_fitting(configs: list[Any], _: dict[str, Any], **meta: Any) -> list[Any]:
    """Matrix instructions need 16 rows."""
    fewest = 1 if meta["BLOCK_B"] == 1 else BATCH_BLOCK
    return [config for config in configs if config.kwargs["BLOCK_R"] >= fewest]


@dataclass(frozen=True)
class Plan:
    """The neurons of all rows of the batch, each listed once, and what else the choice settles.

    Attributes
    ----------
    rows : Tensor
        (R,) int32, ascending for several sets; -1 is filler, of which nothing is read.
    members : Tensor or None
        (S, R) int8, 1 where a set holds the row; None where there is one set.
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
    """An FFN over lists of neurons on a CUDA device; see `corematching.kernels.interface`.

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

    def refuse(self, weights: FFNWeights) -> str | None:
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

        The tensors of ``previous`` are written in place where their shapes match. The list's length
        is ``min(F, S * K)`` however many neurons the sets share. So a captured graph stays valid
        from one choice to the next. The weights are marked as lying where they lie: a graph would
        otherwise copy them at each replay.

        Raises
        ------
        ConfigError
            The choice thresholds the gate of an FFN that has none.
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
    """(S, K), -1 where a set has fewer: the union's rows (R,), and which set holds which (S, R)."""
    sets, count = indices.shape
    if sets == 1:
        return indices[0].to(torch.int32), None
    held = torch.zeros(sets, width + 1, dtype=torch.bool, device=indices.device)
    held = held.scatter(1, torch.where(indices < 0, width, indices), True)[:, :width]
    used = held.any(0)
    length = min(width, sets * count)
    places = torch.where(used, used.cumsum(0) - 1, length)
    rows = torch.full((length + 1,), -1, device=indices.device)
    rows = rows.scatter(0, places, torch.arange(width, device=indices.device))[:length]
    members = held[:, rows.clamp(min=0)] & (rows >= 0)
    return rows.to(torch.int32), members.to(torch.int8)


def _keep(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The new values, at the old address where the tensors are alike."""
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
        _neurons_kernel[lambda meta: (triton.cdiv(num_rows, meta["BLOCK_R"]), batches)](
            x, up, gate, rows, members, up_bias, gate_bias, gate_threshold, output_threshold,
            hidden, batch, batch // sets, width, num_rows, up.stride(0),
            up.stride(0) if gate is None else gate.stride(0),
            GATED=gate is not None, ALIVE_FIRST=gate_threshold is not None,
            ACTIVATION=activation, BLOCK_B=block_b, **INTERPRETED_BLOCKS,
        )  # fmt: skip
        _down_kernel[lambda meta: (triton.cdiv(width, meta["BLOCK_D"]), splits, batches)](
            hidden, down_t, rows, parts, batch, width, num_rows, triton.cdiv(num_rows, splits),
            down_t.stride(0), GATED=False, ALIVE_FIRST=False, BLOCK_B=block_b, **INTERPRETED_BLOCKS,
        )  # fmt: skip
        _sum_kernel[(triton.cdiv(width, 128), batch)](
            parts, bias, out, batch, width, 1 if bias is None else batch // bias.shape[0], splits,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=128,
        )  # fmt: skip
    return out


@_indexed_ffn.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        out = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        out = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        out = tl.maximum(z, 0.0)
    return out


@triton.jit
def _dot(left, right, total):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _project(
    x, weight, bias, rows, live, samples, batch, width, stride,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_R) float32: the rows' products with the samples, read where ``live``."""
    starts = rows.to(tl.int64) * stride
    if BLOCK_B == 1:
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = columns < width
            token = tl.load(x + samples * width + columns, mask=inside, other=0.0)
            block = tl.load(
                weight + starts[:, None] + columns[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            total += block.to(tl.float32) * token.to(tl.float32)[None, :]
        products = tl.sum(total, axis=1)[None, :]
    else:
        products = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for first in range(0, width, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = columns < width
            tokens = tl.load(
                x + samples[:, None] * width + columns[None, :],
                mask=(samples < batch)[:, None] & inside[None, :],
                other=0.0,
            )
            block = tl.load(
                weight + starts[None, :] + columns[:, None],
                mask=live[None, :] & inside[:, None],
                other=0.0,
            )
            products = _dot(tokens, block, products)
    if bias is not None:
        products += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)[None, :]
    return products


@_tune
@triton.jit
def _neurons_kernel(
    x, up, gate, rows, members, up_bias, gate_bias, gate_thresholds, output_thresholds, out,
    batch, group, width, num_rows, up_stride, gate_stride,
    GATED: tl.constexpr, ALIVE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``act(gate(x)) * up(x)`` of BLOCK_R listed neurons for BLOCK_B samples."""
    places = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    samples = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    listed = tl.load(rows + places, mask=places < num_rows, other=-1)
    live = listed >= 0
    chosen = tl.where(live, listed, 0)
    wanted = (samples < batch)[:, None] & live[None, :]
    if members is not None:
        held = tl.load(
            members + (samples // group)[:, None] * num_rows + places[None, :], mask=wanted, other=0
        )
        wanted = wanted & (held != 0)
        live = tl.max(wanted.to(tl.int32), axis=0) > 0
    if GATED:
        gates = _project(
            x, gate, gate_bias, chosen, live, samples, batch, width, gate_stride,
            BLOCK_B, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        values = _activate(gates, ACTIVATION)
        if ALIVE_FIRST:
            least = tl.load(gate_thresholds + samples // group, mask=samples < batch, other=0.0)
            wanted = wanted & (tl.abs(values) >= least[:, None])
            live = tl.max(wanted.to(tl.int32), axis=0) > 0
        values *= _project(
            x, up, up_bias, chosen, live, samples, batch, width, up_stride,
            BLOCK_B, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        ups = _project(
            x, up, up_bias, chosen, live, samples, batch, width, up_stride,
            BLOCK_B, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        values = _activate(ups, ACTIVATION)
    if output_thresholds is not None:
        least = tl.load(output_thresholds + samples // group, mask=samples < batch, other=0.0)
        wanted = wanted & (tl.abs(values) >= least[:, None])
    values = tl.where(wanted, values, 0.0)
    tl.store(
        out + samples[:, None] * num_rows + places[None, :],
        values.to(out.dtype.element_ty),
        mask=(samples < batch)[:, None] & (places < num_rows)[None, :],
    )


@_tune
@triton.jit
def _down_kernel(
    neurons, down, rows, parts, batch, width, num_rows, rows_per_split, stride,
    GATED: tl.constexpr, ALIVE_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split's share of ``down(neurons)``; rows whose neurons are all 0 are not read."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    samples = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, num_rows)
    inside = columns < width
    present = samples < batch
    if BLOCK_B == 1:
        grid = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_R):
        places = first + tl.arange(0, BLOCK_R)
        values = tl.load(
            neurons + samples[:, None] * num_rows + places[None, :],
            mask=present[:, None] & (places < end)[None, :],
            other=0.0,
        )
        listed = tl.load(rows + places, mask=places < end, other=0)
        needed = tl.max((values != 0).to(tl.int32), axis=0) > 0
        block = tl.load(
            down + listed.to(tl.int64)[:, None] * stride + columns[None, :],
            mask=needed[:, None] & inside[None, :],
            other=0.0,
        )
        if BLOCK_B == 1:
            grid += tl.reshape(values, [BLOCK_R, 1]).to(tl.float32) * block.to(tl.float32)
        else:
            total = _dot(values, block, total)
    if BLOCK_B == 1:
        total = tl.sum(grid, axis=0)[None, :]
    tl.store(
        parts + (split * batch + samples)[:, None] * width + columns[None, :],
        total,
        mask=present[:, None] & inside[None, :],
    )


@triton.jit
def _sum_kernel(
    parts, bias, out, batch, width, samples_per_bias, splits,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The splits' sum, plus the sample's bias."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sample = tl.program_id(1)
    inside = columns < width
    split = tl.arange(0, BLOCK_S)
    part = tl.load(
        parts + (split * batch + sample)[:, None] * width + columns[None, :],
        mask=(split < splits)[:, None] & inside[None, :],
        other=0.0,
    )
    total = tl.sum(part, axis=0)
    if bias is not None:
        row = bias + (sample // samples_per_bias) * width
        total += tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + sample * width + columns, total.to(out.dtype.element_ty), mask=inside)


KERNEL = TritonKernel()
