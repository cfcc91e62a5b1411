"""Compiles the C sources on first use, for this very machine, and loads them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs

from .structs import declare

log = logging.getLogger(__name__)

SWITCH = "CORE_MATCHING_NATIVE"
SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
COMPILE_SECONDS = 120


class BuildError(Exception):
    """The sources could not be compiled or loaded."""


def find_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none; says why in the log, once.

    The environment variable ``CORE_MATCHING_NATIVE=0`` turns them off.
    """
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return _say_off()
    return _find_once()


@functools.lru_cache(maxsize=1)
def _say_off() -> None:
    log.info("native kernels are off (%s=0): FFNs run in PyTorch", SWITCH)


@functools.lru_cache(maxsize=1)
def _find_once() -> ctypes.CDLL | None:
    try:
        library = _load(_compiled())
    except (BuildError, OSError) as error:
        log.warning("no native kernels, FFNs run in PyTorch: %s", error)
        return None
    log.debug("native kernels for %s", library.cm_target().decode())
    return library


def _compiled() -> Path:
    """The shared library in the cache; compiled first where it is not there."""
    compiler = _compiler()
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.c")])
    digest = hashlib.sha256()
    for part in (repr((FLAGS, VARIANTS)), compiler, platform.machine(), _cpu()):
        digest.update(part.encode() + b"\0")
    for file in files:
        digest.update(file.read_bytes())
    path = _cache_directory() / f"kernels-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    """Try the variants in turn; the file appears whole or not at all."""
    said = ""
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            out = Path(place) / path.name
            source = str(SOURCES / "corematching.c")
            command = [compiler, *FLAGS, *variant, "-o", str(out), source, "-lm"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"'{compiler}' did not run: {error}") from error
            if done.returncode == 0:
                os.replace(out, path)
                log.info("compiled the native kernels with '%s %s'", compiler, " ".join(variant))
                return
            said = said or done.stderr.strip()
    raise BuildError(f"'{compiler}' failed: {said.splitlines()[0] if said else 'no message'}")


def _load(path: Path) -> ctypes.CDLL:
    """Load the library; torch has loaded its OpenMP runtime by now, which is then shared."""
    return declare(ctypes.CDLL(str(path)))


def _compiler() -> str:
    if sys.platform == "win32":
        raise BuildError("no native build on Windows yet")
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name.split()[0]
    raise BuildError("no C compiler found: install one (gcc or clang), or set CC")


def _cache_directory() -> Path:
    override = os.environ.get("CORE_MATCHING_CACHE")
    root = Path(override) if override else Path(platformdirs.user_cache_dir("corematching"))
    return root / "native"


def _cpu() -> str:
    """What tells machines apart that share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(kept)))
