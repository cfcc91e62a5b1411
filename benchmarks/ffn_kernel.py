"""The indexed FFN kernel alone: bytes of chosen weights per second, beside a copy's.

    python benchmarks/ffn_kernel.py                  # LLaVA-1.5-7B's FFN, 40 % of the neurons
    python benchmarks/ffn_kernel.py --hidden 576 --width 1536 --layers 30        # SceneVLM's

Random weights; every layer has its own, and together they are larger than the caches. Copy and
kernel take turns, so that what slows the machine slows both; the figures are medians, the spread is
that of the rounds' own ratios. Runs on the fastest kernel of the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from corematching.backends.kernels import FFNWeights, NeuronSets, find_kernel
from corematching.lab.bench.machine import require_quiet, synchronise

COPY_BYTES = 1 << 28


def draw_layer(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> FFNWeights:
    """Random weights of one gated FFN."""
    shape, scale = (args.width, args.hidden), args.hidden**-0.5
    matrices = [
        (torch.randn(shape, dtype=torch.float32) * scale).to(device, dtype) for _ in range(3)
    ]
    return FFNWeights(up=matrices[0], gate=matrices[1], down_t=matrices[2])


def time_once(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GB/s of the kernel and of a copy, and the kernel's share of the copy in every round."""
    layers = [draw_layer(args, dtype, device) for _ in range(args.layers)]
    kernel = find_kernel(layers[0])
    if kernel is None:
        raise SystemExit(f"no kernel reads these weights in place on {device}")
    count = round(args.neurons * args.width)
    plans = []
    for weights in layers:
        chosen = torch.randperm(args.width)[:count].sort().values[None].to(device)
        plans.append(kernel.prepare(weights, NeuronSets(chosen)))
    x = torch.randn(args.batch, args.hidden).to(device, dtype)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run_kernel() -> list[Tensor]:
        return [kernel.run(x, w, plan) for w, plan in zip(layers, plans, strict=True)]

    read = 3 * count * args.hidden * x.element_size() * args.layers
    rounds: list[tuple[float, float]] = []
    for _ in range(args.rounds + 1):
        copy = time_once(lambda: target.copy_(source), device)
        own = time_once(run_kernel, device)
        rounds.append((2 * COPY_BYTES / copy / 1e9, read / own / 1e9))
    rounds = rounds[1:]
    shares = sorted(own / copy for copy, own in rounds)
    return {
        "copy_gb_per_s": statistics.median(copy for copy, _ in rounds),
        "kernel_gb_per_s": statistics.median(own for _, own in rounds),
        "share": statistics.median(shares),
        "share_low": shares[len(shares) // 10],
        "share_high": shares[-1 - len(shares) // 10],
        "kernel": kernel.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--neurons", type=float, default=0.4, help="share of the neurons")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--force", action="store_true", help="also on a busy machine")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    require_quiet(force=args.force)
    device = torch.device(args.device)
    results = {name: measure(args, getattr(torch, name), device) for name in args.dtype}
    if args.json:
        print(json.dumps(results))
        return
    print(f"{args.hidden} x {args.width}, {args.neurons:.0%} of the neurons, batch {args.batch}")
    for name, row in results.items():
        print(
            f"{name:9} {row['kernel']:7} {row['kernel_gb_per_s']:7.1f} GB/s, a copy "
            f"{row['copy_gb_per_s']:7.1f} GB/s: {row['share']:.0%} "
            f"({row['share_low']:.0%}-{row['share_high']:.0%})"
        )


if __name__ == "__main__":
    main()
