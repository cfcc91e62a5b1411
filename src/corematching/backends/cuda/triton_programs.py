"""The Triton programs of the indexed FFN; `corematching.backends.cuda.triton_ffn` launches them.

Shapes: B samples, d hidden size, R listed rows of weights; -1 is filler.
"""

# ruff: noqa: N803 - Triton's constants are written in capitals

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BATCH_BLOCK = 16  # the smallest number of rows of a matrix instruction
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as integers


def _tune(kernel: Any) -> Any:
    """Autotune the block sizes, once per shape; not in the interpreter."""
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
    """The configurations for a batch: matrix instructions need 16 rows."""
    fewest = 1 if meta["BLOCK_B"] == 1 else BATCH_BLOCK
    return [config for config in configs if config.kwargs["BLOCK_R"] >= fewest]


@triton.jit
def _activate(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
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
def _dot(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _project(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    samples: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
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
def neurons_kernel(
    x: tl.tensor, up: tl.tensor, gate: tl.tensor, rows: tl.tensor, members: tl.tensor,
    up_bias: tl.tensor, gate_bias: tl.tensor, gate_thresholds: tl.tensor,
    output_thresholds: tl.tensor, out: tl.tensor, batch: tl.tensor, group: tl.tensor,
    width: tl.tensor, num_rows: tl.tensor, up_stride: tl.tensor, gate_stride: tl.tensor,
    GATED: tl.constexpr, ALIVE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """``act(gate(x)) * up(x)`` of BLOCK_R listed neurons for BLOCK_B samples."""
    entries = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    samples = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    listed = tl.load(rows + entries, mask=entries < num_rows, other=-1)
    live = listed >= 0
    chosen = tl.where(live, listed, 0)
    wanted = (samples < batch)[:, None] & live[None, :]
    if members is not None:
        held = tl.load(
            members + (samples // group)[:, None] * num_rows + entries[None, :],
            mask=wanted,
            other=0,
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
        out + samples[:, None] * num_rows + entries[None, :],
        values.to(out.dtype.element_ty),
        mask=(samples < batch)[:, None] & (entries < num_rows)[None, :],
    )


@_tune
@triton.jit
def down_kernel(
    neurons: tl.tensor,
    down: tl.tensor,
    rows: tl.tensor,
    parts: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    num_rows: tl.tensor,
    rows_per_split: tl.tensor,
    stride: tl.tensor,
    GATED: tl.constexpr,
    ALIVE_FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The partial sum of ``down(neurons)`` over one split; skips rows whose neurons are all 0."""
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
        entries = first + tl.arange(0, BLOCK_R)
        values = tl.load(
            neurons + samples[:, None] * num_rows + entries[None, :],
            mask=present[:, None] & (entries < end)[None, :],
            other=0.0,
        )
        listed = tl.load(rows + entries, mask=entries < end, other=0)
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
def sum_kernel(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    samples_per_bias: tl.tensor,
    splits: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The sum of the splits, plus the sample's bias."""
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
