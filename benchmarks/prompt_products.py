"""Gemm and attention of prompts, against oneDNN and PyTorch in turn, as a Markdown table.

oneDNN gets packed weights, as `torch.compile` hands them over. ``ONEDNN_MAX_CPU_ISA`` and
``CORE_MATCHING_ISA`` name the instruction sets.

python benchmarks/prompt_products.py [--threads 1] [--rounds 60] [--hidden 576 --width 1536]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from corematching.backends.cpu.native import (
    Gemm,
    PrefillAttention,
    find_kernels,
    why_unsupported_attention,
    why_unsupported_gemm,
)

DTYPES = (torch.bfloat16, torch.float32)


def time_once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(rows: int, outputs: int, inputs: int, dtype: torch.dtype, rounds: int) -> list[str]:
    """GFLOP/s of oneDNN and of our product, the best of so many in turn; "-" where it has none."""
    x = torch.randn(rows, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    ways: list[Callable[[], object]] = [packed_linear(x, weight)]
    if why_unsupported_gemm(weight) is None:
        gemm = Gemm()
        ways.append(lambda: gemm.linear(x, weight, None))
    return find_rates(ways, 2.0 * rows * outputs * inputs, rounds)


def packed_linear(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """oneDNN's product with packed weights; PyTorch's own where oneDNN has none for the dtype."""
    onednn = torch.ops.mkldnn
    try:
        packed = onednn._reorder_linear_weight(weight, len(x))
    except RuntimeError:
        return lambda: F.linear(x, weight)
    return lambda: onednn._linear_pointwise(x, packed, None, "none", [], "")


def compare_attention(
    rows: int, heads: int, groups: int, dtype: torch.dtype, rounds: int
) -> list[str]:
    """The same for causal attention of heads of 64 numbers, over pairs that are seen."""
    size = 64
    query, key, value = (
        torch.randn(1, rows, count, size).to(dtype).transpose(1, 2)
        for count in (heads, groups, groups)
    )

    def attend() -> object:
        repeat = heads // groups
        keys, values = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
        return mixed.transpose(1, 2).contiguous()

    ways: list[Callable[[], object]] = [attend]
    if why_unsupported_attention(query, key, value, None) is None:
        attention = PrefillAttention()
        ways.append(lambda: attention.attend(query, key, value, None, size**-0.5, True))
    return find_rates(ways, 2.0 * rows * (rows + 1) * heads * size, rounds)


def find_rates(ways: list[Callable[[], object]], flops: float, rounds: int) -> list[str]:
    """GFLOP/s of each way, the best of so many in turn."""
    best = [
        min(times)
        for times in zip(*([time_once(way) for way in ways] for _ in range(rounds)), strict=True)
    ]
    rates = [f"{1e-9 * flops / seconds:.0f}" for seconds in best]
    return rates + ["-"] * (2 - len(rates))


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    kernels = find_kernels()
    isa = "none" if kernels is None else kernels.isa
    print(f"| rows | outputs x inputs | bf16, oneDNN | bf16, {isa} | fp32, oneDNN | fp32, {isa} |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    hidden, width = args.hidden, args.width
    for rows in args.rows:
        for outputs, inputs in ((hidden, hidden), (width, hidden), (hidden, width)):
            cells = [
                cell
                for dtype in DTYPES
                for cell in compare(rows, outputs, inputs, dtype, args.rounds)
            ]
            print(f"| {rows} | {outputs} x {inputs} | " + " | ".join(cells) + " |")
        cells = [
            cell
            for dtype in DTYPES
            for cell in compare_attention(rows, args.heads, args.groups, dtype, args.rounds)
        ]
        print(
            f"| {rows} | attention, {args.heads} heads, against PyTorch's | "
            + " | ".join(cells)
            + " |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 190, 300, 640])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--heads", type=int, default=9, help="of 64 numbers each")
    parser.add_argument("--groups", type=int, default=3, help="keys and values, which heads share")
    parser.add_argument("--width", type=int, default=1536)
    run(parser.parse_args())
