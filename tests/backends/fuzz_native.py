"""Runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with random shapes.

``python -m tests.backends.fuzz_native`` builds the extension module with sanitizers and with matrix
tiles emulated (amx_emulation.h), and runs random cases (native_cases) on every instruction set of
this processor against float64 until the time is up. A fault ends it with the sanitizer's report and
the seed that brings it back (``--seed``, with the instruction set as ``--isa``).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
BUILD_SECONDS = 1200
EXTENSION = "CORE_MATCHING_FUZZED_EXTENSION"
MODULE = "corematching.backends.cpu._kernels"


def main() -> int:
    """Build and run every instruction set; 0 where no fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="of cases, per instruction set")
    parser.add_argument("--seed", type=int, help="run the case of this seed alone")
    parser.add_argument("--isa", help="run on this instruction set alone")
    options = parser.parse_args()
    if EXTENSION in os.environ:
        return run_cases(options.seconds, options.seed, options.isa)
    with tempfile.TemporaryDirectory() as place:
        print("compiling", flush=True)
        return run_under(build(Path(place)), options)


def build(place: Path) -> Path:
    """The extension module with sanitizers, in a folder."""
    bin_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=bin_path)
    if cmake is None:
        raise SystemExit("there is no cmake: pip install cmake")
    nanobind = [sys.executable, "-m", "nanobind", "--cmake_dir"]
    found = subprocess.run(nanobind, capture_output=True, text=True, check=True).stdout.strip()
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": FLAGS,
        "COREMATCHING_EMULATE_TILES": "ON",
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": found,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    quiet = {"check": True, "timeout": BUILD_SECONDS, "stdout": subprocess.DEVNULL}
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(place), *defined], **quiet)
    subprocess.run([cmake, "--build", str(place), "--parallel", "2"], **quiet)
    return next(place.glob("_kernels*.so"))


def run_under(extension: Path, options: argparse.Namespace) -> int:
    """Run this file again with the sanitizers' runtime loaded before everything else."""
    compiler = os.environ.get("CXX", "g++").split() or ["g++"]
    runtimes = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        EXTENSION: str(extension),
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "3",
    }
    own = [sys.executable, "-m", "tests.backends.fuzz_native", "--seconds", str(options.seconds)]
    for name in ("seed", "isa"):
        value = getattr(options, name)
        own += [] if value is None else [f"--{name}", str(value)]
    code = subprocess.run(own, env=environment, check=False).returncode
    noted = extension.with_suffix(".seed")
    if code:
        print(f"failed at {noted.read_text() if noted.exists() else '?'}")
    return code


def run_cases(seconds: float, seed: int | None, isa: str | None) -> int:
    """Cases of one seed after the other; 1 at the first that differs from float64."""
    import torch  # noqa: F401  (before the extension, which shares its OpenMP runtime)

    spec = importlib.util.spec_from_file_location(MODULE, os.environ[EXTENSION])
    assert spec is not None and spec.loader is not None
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from corematching.backends.cpu import native

    native.Scratch.reserve = _reserve_exactly  # type: ignore[method-assign]
    for name in native.supported_isas():
        if isa in (None, name):
            with native.use_isa(name):
                if not _pass(name, seconds, seed):
                    return 1
    return 0


def _pass(isa: str, seconds: float, seed: int | None) -> bool:
    """Whether the cases within so many seconds, or the one of a seed, agree with float64."""
    import torch

    from .native_cases import MAKERS, Draw, is_close

    noted = Path(os.environ[EXTENSION]).with_suffix(".seed")
    current, last = (0, 10**9) if seed is None else (seed, seed + 1)
    end = time.monotonic() + seconds
    while current < last and (seed is not None or time.monotonic() < end):
        draw = Draw(current)
        torch.set_num_threads(draw.random.randint(1, 3))
        case = MAKERS[current % len(MAKERS)](draw)
        noted.write_text(f"--seed {current} --isa {isa}")
        ours = case.call(**case.tensors)
        if ours is None or not is_close(case, ours, case.reference(**case.tensors)):
            print(f"  {isa}, seed {current}: {case.name} differs from float64", flush=True)
            return False
        _poison(case)
        case.call(**case.tensors)
        current += 1
    print(f"  {isa}: {current - (seed or 0)} cases, no fault", flush=True)
    return True


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
