"""What choosing tokens and neurons costs, against the prefill that it is part of.

    python benchmarks/selection_cost.py layer               # the shape of LLaVA-1.5-7B's layers
    python benchmarks/selection_cost.py prefill             # SceneVLM, its example picture
    python benchmarks/selection_cost.py prefill --method paper --dtype float32
    python benchmarks/selection_cost.py launches            # SceneVLM's prompt on a GPU, counted

``layer`` times every rule on random activations against one decoder layer's matrix products, the
gate computed anew (prompts on tiles keep it). ``prefill`` sums the seconds spent in a method's
rules and divides by the report's prefill seconds; ``later`` is what waits for the first token, and
is done in front of the first decode step. Medians; run it on a machine that does nothing else.

``launches`` counts the kernels that a GPU is given up to the first token, and how often it is
waited for. Without a GPU Triton's interpreter and a stand-in count the same code, in some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from corematching import CoreMatching, load_demo
from corematching.cache.masks import take
from corematching.demo.example import read_example
from corematching.lab.bench.launches import LaunchCounter, gpu_stand_in
from corematching.methods import Sparsifier, TopNeurons
from corematching.protocol import NeuronChoice, NeuronPolicy, PrefillView, TokenChoice, TokenPolicy

METHODS = {"default": CoreMatching, "paper": CoreMatching.paper}
COUNTED = {
    "dense": None,
    "default": CoreMatching(),
    "tokens alone": CoreMatching(neurons=None),
    "20 % of tokens, 40 % of neurons": CoreMatching(keep_ratio=0.2, neurons=TopNeurons(0.4)),
    "the paper's rule": CoreMatching.paper(),
}
SYSTEM_TOKENS = 35


class Timed:
    """A copy of a policy that adds up the seconds of its choices, and of their later parts."""

    def __init__(self, policy: TokenPolicy | NeuronPolicy) -> None:
        self.policy, self.seconds, self.later = copy.copy(policy), 0.0, 0.0
        self._choose: Callable[..., TokenChoice | NeuronChoice] = policy.choose
        object.__setattr__(self.policy, "choose", self._time_choice)

    def _time_choice(self, *args: Any) -> TokenChoice | NeuronChoice:
        start = time.perf_counter()
        choice = self._choose(*args)
        self.seconds += time.perf_counter() - start
        if isinstance(choice, NeuronChoice) and choice.later is not None:
            choice.later = functools.partial(self._time_later, choice.later)
        return choice

    def _time_later(
        self, later: Callable[[], Mapping[str, torch.Tensor | None]]
    ) -> Mapping[str, torch.Tensor | None]:
        start = time.perf_counter()
        found = later()
        self.later += time.perf_counter() - start
        return found


def time_calls(call: Callable[[], Any], repeats: int) -> float:
    """The median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_view(args: argparse.Namespace, dtype: torch.dtype) -> PrefillView:
    """Random activations, SiLU-gated, of a prompt with one picture in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, args.tokens, args.hidden, generator=generator).to(dtype)
    gate, up = (
        torch.randn(args.width, args.hidden, generator=generator).to(dtype) / args.hidden**0.5
        for _ in range(2)
    )
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    image = torch.zeros_like(valid)
    image[:, SYSTEM_TOKENS : SYSTEM_TOKENS + args.image_tokens] = True

    def compute_gate(rows: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(take(x, rows), gate))

    activations = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return PrefillView(
        16, 32, valid, image, activations=activations, hidden=x, inputs=x, gate=compute_gate
    )


def time_layer(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Seconds of one decoder layer's matrix products: four d x d, three d x F."""
    x = torch.randn(args.batch * args.tokens, args.hidden).to(dtype)
    square = torch.randn(args.hidden, args.hidden).to(dtype)
    wide = torch.randn(args.width, args.hidden).to(dtype)
    narrow = wide.t().contiguous()

    def multiply() -> None:
        for _ in range(4):
            F.linear(x, square)
        F.linear(F.linear(x, wide), narrow)
        F.linear(x, wide)

    return time_calls(multiply, args.repeats)


def measure_layer(args: argparse.Namespace) -> None:
    """Every method's rules on one layer."""
    dtype = getattr(torch, args.dtype)
    layer = time_layer(args, dtype)
    print(f"{args.batch} x {args.tokens} tokens, d = {args.hidden}, F = {args.width}, {dtype}")
    print(f"the layer's matrix products: {layer * 1e3:.1f} ms")
    view = make_view(args, dtype)
    for name, make in METHODS.items():
        method = make()
        count = method.neurons.counts(32, args.width)[16]
        rules = {
            "neurons": lambda method=method, count=count: method.neurons.choose(
                view, count
            ).materialize(),
            "tokens": lambda method=method: method.tokens.choose(view),
        }
        for part, rule in rules.items():
            seconds = time_calls(rule, args.repeats)
            print(f"{name:8} {part:8} {seconds * 1e3:8.1f} ms  {seconds / layer:6.1%} of the layer")


def load_example(args: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """SceneVLM and the inputs of its example."""
    model, processor = load_demo(dtype=getattr(torch, args.dtype))
    example = read_example()
    content = [
        {"type": "image", "image": Image.open(example.image)},
        {"type": "text", "text": example.question},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device, dtype=model.dtype)
    return model.to(device), inputs


def measure_launches(args: argparse.Namespace) -> None:
    """Launches and waits of SceneVLM's prompt, up to the first token, as a table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it at its first import, which is behind
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    model, inputs = load_example(args, device)
    print("| method | launches | more than dense | waits |\n|---|---:|---:|---:|")
    dense = 0
    for name, method in COUNTED.items():
        counter = LaunchCounter()
        with contextlib.ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(gpu_stand_in())
            if method is not None:
                stack.enter_context(method(model, engine="torch" if device == "cpu" else "auto"))
            stack.enter_context(counter.counting())
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        total = counter.launches.total()
        dense = dense or total
        print(f"| {name} | {total} | {total / dense - 1:.1%} | {counter.waits.total()} |")


def measure_prefill(args: argparse.Namespace) -> None:
    """A method's rules inside SceneVLM's prefill."""
    model, inputs = load_example(args, "cpu")
    method = METHODS[args.method]()
    rows = []
    for _ in range(args.repeats + 1):
        tokens, neurons = Timed(method.tokens), Timed(method.neurons)
        with (
            torch.inference_mode(),
            Sparsifier(tokens=tokens.policy, neurons=neurons.policy)(model) as run,
        ):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            prefill = run.report.prefill_seconds
        rows.append((prefill, tokens.seconds, neurons.seconds, neurons.later))
    for column, name in enumerate(("prefill", "tokens", "neurons", "later")):
        seconds = statistics.median(row[column] for row in rows[1:])
        ratio = statistics.median(row[column] / row[0] for row in rows[1:])
        print(f"{name:8} {seconds * 1e3:8.1f} ms  {ratio:6.1%} of the prefill")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("layer", "prefill", "launches"))
    parser.add_argument("--method", choices=METHODS, default="default", help="for prefill")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="for layer, as what follows")
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    arguments = parser.parse_args()
    measures = {"layer": measure_layer, "prefill": measure_prefill, "launches": measure_launches}
    measures[arguments.what](arguments)
