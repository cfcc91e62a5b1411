"""A model larger than the memory: ours under a cap beside accelerate's off-loading under the same.

    python benchmarks/memory.py                              # a 2 GB model, cap 60 % of it, 2 pairs
    python benchmarks/memory.py --layers 24 --pairs 3 --dtype float32
    python benchmarks/memory.py --page-cache                 # accelerate may keep its files cached

A checkpoint of LLaVA's form with random weights (hidden size 2048, 11008 neurons and 2 key-value
heads, as Qwen2.5-3B) is written to a temporary directory. Each run is a process of its own, in turn
A B A B: accelerate's (``device_map="auto"`` with the cap as the CPU's ``max_memory``, the rest on
disk) and ours (``corematching.load`` with the cap). Both start with their files out of the page
cache.

A cap on a process does not stop the kernel from caching its files, which are memory as well. So the
page cache is bounded for both: we drop what we read, and accelerate's files are dropped behind each
decoder layer (``--page-cache`` leaves them). The peak is the highest sum of the process's own
memory beyond what it took before the model was loaded, and of the checkpoint's pages in the page
cache, looked at 50 times a second. With a CUDA device the same runs there, and its allocator gives
the peak. Linux 6.5 or later.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from corematching.sizes import format_size

HIDDEN, WIDTH, HEADS, KV_HEADS, VOCAB = 2048, 11008, 16, 2, 32064
IMAGE_ID, IMAGE_SIDE, PATCH = 32000, 224, 16
TEXT_TOKENS = 40
SAMPLE_SECONDS = 0.02
CACHESTAT = 451
LIBC = ctypes.CDLL(None, use_errno=True)
OWN = ("RssAnon:", "RssShmem:")
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": True,
    "eos_token_id": None,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH,
}


def make_checkpoint(path: Path, layers: int, dtype: torch.dtype) -> int:
    """Write a random model; gives its bytes."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from corematching.bench.random_model import fill

    text = {**TEXT, "num_hidden_layers": layers}
    config = LlavaConfig(
        text_config=text, vision_config=VISION, image_token_index=IMAGE_ID, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.tie_weights()
    model = model.to_empty(device="cpu")
    fill(model, torch.device("cpu"), dtype)
    model.save_pretrained(path)
    os.sync()  # pages that are yet to be written cannot be dropped
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def make_inputs(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """One picture and a short question."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE_ID, (TEXT_TOKENS,), generator=draw)
    image = torch.full(((IMAGE_SIDE // PATCH) ** 2,), IMAGE_ID)
    ids = torch.cat([text[:5], image, text[5:]])[None]
    pixels = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE, generator=draw).to(dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(device) for name, value in inputs.items()}


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_bytes(files: list[Path]) -> int:
    """Bytes of files in the page cache, by Linux's cachestat (6.5 and later)."""
    total, whole = 0, (ctypes.c_uint64 * 2)(0, 0)
    counts = (ctypes.c_uint64 * 5)()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        failed = LIBC.syscall(CACHESTAT, descriptor, whole, counts, 0)
        os.close(descriptor)
        if failed:
            raise SystemExit("this Linux cannot say what it caches: run it on 6.5 or later")
        total += counts[0] * os.sysconf("SC_PAGESIZE")
    return total


def own_bytes() -> int:
    """This process's memory without what it maps of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(OWN))


class PeakWatch:
    """Looks at the process's memory and its files' pages in the background."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.before = files, own_bytes()
        self.peak = self.pages = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            pages = cached_bytes(self.files)
            grown = own_bytes() - self.before
            self.peak, self.pages = max(self.peak, grown + pages), max(self.pages, pages)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """Seconds to the first token and per further one."""
    clock, start = Clock(), time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=steps, do_sample=False, streamer=clock)
    first, last = clock.times[1], clock.times[-1]  # the prompt comes before the first token
    return {"ttft": first - start, "tpot": (last - first) / (len(clock.times) - 2)}


def run_accelerate(args: argparse.Namespace, files: list[Path], device: str) -> dict[str, Any]:
    """The dense model, as much of it in memory as the cap allows."""
    from transformers import AutoModelForImageTextToText

    place = {"cpu": args.cap} if device == "cpu" else {0: args.cap, "cpu": "1000GiB"}
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint, dtype="auto", device_map="auto", max_memory=place
    ).eval()
    forget(files)
    if not args.page_cache and device == "cpu":
        for layer in model.get_decoder().layers:
            layer.register_forward_hook(lambda *_: forget(files))
    places = list(model.hf_device_map.values())
    outside = sum(place in ("disk", "cpu" if device != "cpu" else "disk") for place in places)
    if not outside:
        raise SystemExit("the whole model fits under the cap: give a smaller --cap-share")
    inputs = make_inputs(next(model.parameters()).dtype, device)
    return generate(model, inputs, args.dense_tokens) | {"modules_outside": outside}


def run_ours(args: argparse.Namespace, files: list[Path], device: str) -> dict[str, Any]:
    """The same model with chosen neurons and tokens."""
    from corematching import CoreMatching, TopNeurons, load

    model = load(args.checkpoint, args.cap, device=device)
    forget(files)
    neurons = TopNeurons(args.neuron_ratio, dense_first=0, dense_last=0)
    method = CoreMatching(keep_ratio=args.keep_ratio, layer=1, neurons=neurons)
    inputs = make_inputs(next(model.parameters()).dtype, device)
    with method(model) as run:
        times = generate(model, inputs, args.new_tokens)
        memory = run.report.memory
        assert memory is not None
    return times | {"streamed": memory.streamed_bytes, "own_peak": memory.peak_bytes}


def run_child(args: argparse.Namespace) -> None:
    """One run; its numbers go to standard output."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    import accelerate  # noqa: F401  what is imported here is not the model's memory
    import transformers
    from transformers import AutoModelForImageTextToText  # noqa: F401

    from corematching import CoreMatching, load  # noqa: F401

    transformers.logging.set_verbosity_error()
    files = sorted(Path(args.checkpoint).glob("*.safetensors"))
    forget(files)
    watch = PeakWatch(files)
    result = {"accelerate": run_accelerate, "ours": run_ours}[args.child](args, files, device)
    watch.stop()
    result |= {"peak": watch.peak, "page_cache": watch.pages, "device": device}
    if device == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def start(args: argparse.Namespace, kind: str, checkpoint: Path, cap: int) -> dict[str, Any]:
    """Run one kind in a process of its own."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in PASSED]
    command = [sys.executable, __file__, "--child", kind, "--checkpoint", str(checkpoint)]
    command += ["--cap", str(cap), *options, *(["--page-cache"] if args.page_cache else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, result: dict[str, Any], cap: int) -> None:
    print(
        f"{name:12} TTFT {result['ttft']:7.2f} s  TPOT {result['tpot']:8.4f} s  peak "
        f"{format_size(result['peak']):>9} ({result['peak'] / cap:.0%} of the cap, "
        f"{format_size(result['page_cache'])} of it page cache at most)",
        flush=True,
    )


def compare(args: argparse.Namespace) -> None:
    """Write the checkpoint, run the pairs, and print what came out."""
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        size = make_checkpoint(Path(folder), args.layers, getattr(torch, args.dtype))
        cap = int(size * args.cap_share)
        print(f"checkpoint {format_size(size)} ({args.dtype}), cap {format_size(cap)}", flush=True)
        ratios, peaks = [], []
        for _ in range(args.pairs):
            dense = start(args, "accelerate", Path(folder), cap)
            show("accelerate", dense, cap)
            ours = start(args, "ours", Path(folder), cap)
            show("ours", ours, cap)
            ratios.append(dense["tpot"] / ours["tpot"])
            peaks.append(ours["peak"])
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    print(
        f"per token {statistics.median(ratios):.1f}x faster (pairs: {spread}) on {ours['device']}"
    )
    if max(peaks) > cap:
        raise SystemExit(f"our peak of {format_size(max(peaks))} is above the cap")


PASSED = ("neuron_ratio", "keep_ratio", "new_tokens", "dense_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--cap-share", type=float, default=0.6, help="of the checkpoint's size")
    parser.add_argument("--neuron-ratio", type=float, default=0.25, help="kept in every layer")
    parser.add_argument("--keep-ratio", type=float, default=0.2, help="of the image tokens")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--dense-tokens", type=int, default=4, help="accelerate's new tokens")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--page-cache", action="store_true", help="leave accelerate's files cached")
    parser.add_argument("--directory", help="for the checkpoint, on a disk, not in memory")
    for name in ("--child", "--checkpoint"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_child(args) if args.child else compare(args)


if __name__ == "__main__":
    main()
