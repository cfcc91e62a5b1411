"""Runs the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with random shapes.

``python -m tests.backends.fuzz_native`` compiles the C sources three times, for this processor with
the tile instructions emulated in C (emulated_tiles.h), for AVX2 and for no vectors at all, and runs
random cases (native_cases.py) against float64 until the time is up. A fault ends it with the
sanitizer's report and the seed that brings it back (``--seed``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src/corematching/backends/cpu/native/corematching.c"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
BUILDS = {
    "this processor, emulated tiles": ("-march=native", "-DCM_EMULATE_TILES"),
    "AVX2": ("-march=x86-64-v3",),
    "no vectors": ("-march=x86-64",),
}
COMPILE_SECONDS = 300
LIBRARY = "CM_FUZZ_LIBRARY"


def main() -> int:
    """Compile and run every build; 0 where no fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="of cases, per build")
    parser.add_argument("--seed", type=int, help="run the case of this seed alone")
    options = parser.parse_args()
    if LIBRARY in os.environ:
        return run_cases(options.seconds, options.seed)
    compiler = os.environ.get("CC", "gcc").split() or ["gcc"]
    with tempfile.TemporaryDirectory() as place:
        for name, flags in BUILDS.items():
            print(f"{name}: compiling", flush=True)
            library = Path(place) / "kernels.so"
            command = [*compiler, *FLAGS, *SANITIZERS, *flags, "-o", str(library), str(SOURCE)]
            subprocess.run([*command, "-lm"], check=True, timeout=COMPILE_SECONDS)
            code = run_under(compiler, library, options)
            if code:
                seed = library.with_suffix(".seed")
                print(f"{name}: failed at seed {seed.read_text() if seed.exists() else '?'}")
                return code
    return 0


def run_under(compiler: list[str], library: Path, options: argparse.Namespace) -> int:
    """Run this file again with the sanitizers' runtime loaded before everything else."""
    runtimes = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        LIBRARY: str(library),
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "3",
    }
    own = [sys.executable, "-m", "tests.backends.fuzz_native", "--seconds", str(options.seconds)]
    if options.seed is not None:
        own += ["--seed", str(options.seed)]
    limit = options.seconds + COMPILE_SECONDS
    return subprocess.run(own, env=environment, timeout=limit, check=False).returncode


def run_cases(seconds: float, seed: int | None) -> int:
    """Cases of one seed after the other; 1 at the first that differs from float64."""
    import ctypes

    import torch

    from corematching.backends.cpu import native
    from corematching.backends.cpu.native import build
    from corematching.backends.cpu.native.structs import declare

    library = declare(ctypes.CDLL(os.environ[LIBRARY]))
    build._find_once = lambda: library  # type: ignore[assignment]
    native.Scratch.reserve = _reserve_exactly  # type: ignore[method-assign]
    from .native_cases import Draw, is_close, list_makers

    makers, end = list_makers(), time.monotonic() + seconds
    print(f"  {library.cm_target().decode()}, {len(makers)} kernels", flush=True)
    noted = Path(os.environ[LIBRARY]).with_suffix(".seed")
    current, last = (0, 10**9) if seed is None else (seed, seed + 1)
    while current < last and (seed is not None or time.monotonic() < end):
        draw = Draw(current)
        torch.set_num_threads(draw.random.randint(1, 3))
        case = makers[current % len(makers)](draw)
        noted.write_text(str(current))
        ours = case.call(**case.tensors)
        if ours is None or not is_close(case, ours, case.reference(**case.tensors)):
            print(f"  seed {current}: {case.name} differs from float64", flush=True)
            return 1
        _poison(case)
        case.call(**case.tensors)
        current += 1
    print(f"  {current - (seed or 0)} cases, no fault", flush=True)
    return 0


def _poison(case) -> None:  # type: ignore[no-untyped-def]
    """Put NaN, infinities and numbers without a bf16 into what the kernel reads."""
    import torch

    for number, x in enumerate(case.tensors.values()):
        if x is not None and x.is_floating_point():
            value = (torch.nan, torch.inf, -torch.inf, 3.3e38, 1e-42)[number % 5]
            places = torch.arange(x.numel()).view(x.shape) % 7 == number % 7
            x.masked_fill_(places, value)


def _reserve_exactly(self, size: int) -> int:  # type: ignore[no-untyped-def]
    """As `Scratch.reserve`, but memory that ends where the kernel may write last."""
    import torch

    self._memory = torch.empty(size, dtype=torch.uint8)
    assert self._memory.data_ptr() % 64 == 0, "torch aligns memory to cache lines"
    return self._memory.data_ptr()


if __name__ == "__main__":
    sys.exit(main())
