"""Compiles the C sources on first use, for this very machine, and loads them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from corematching.backends.cpu.native import store
from corematching.backends.cpu.native.structs import declare
from corematching.directories import CACHE_VARIABLE

log = logging.getLogger(__name__)

SWITCH = "CORE_MATCHING_NATIVE"
SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
ANSWER_SECONDS, COMPILE_SECONDS = 10, 90
"""A compiler says its version within the first, and compiles within the second."""

_lock = threading.RLock()


class BuildError(Exception):
    """The sources could not be compiled or loaded."""


def find_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none; says why in the log, once.

    The environment variable ``CORE_MATCHING_NATIVE=0`` turns them off.
    """
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return _say_off()
    if _find_once.cache_info().currsize:
        return _find_once()  # without the lock, which an interrupt might have left closed
    with _lock:
        return _find_once()


@functools.lru_cache(maxsize=1)
def _say_off() -> None:
    log.info("native kernels are off (%s=0): FFNs run in PyTorch", SWITCH)


@functools.lru_cache(maxsize=1)
def _find_once() -> ctypes.CDLL | None:
    try:
        library = _find()
    except (BuildError, OSError) as error:
        log.warning("no native kernels, FFNs run in PyTorch: %s", error)
        return None
    log.debug("native kernels for %s", library.cm_target().decode())
    return library


def _find() -> ctypes.CDLL:
    """The library in the cache; compiled first where none is there that can be loaded."""
    compiler = _compiler()
    key, directory = _key(compiler), store.cache_directory()
    path = store.find_stored(directory, key)
    if path is not None:
        try:
            library = _load(path)
        except BuildError as error:
            log.warning("%s: the kernels are compiled again", error)
        else:
            store.note_use(path)
            return library
    reason = store.open_directory(directory)
    if reason is None:
        try:
            return _build(compiler, directory, key)
        except OSError as error:
            reason = f"{directory} cannot be written to: {error.strerror}"
    log.warning(
        "%s: the kernels are compiled for this process alone; set %s to a directory of your own",
        reason,
        CACHE_VARIABLE,
    )
    with tempfile.TemporaryDirectory(prefix="corematching-") as place:
        return _build(compiler, Path(place), key)


def _build(compiler: list[str], directory: Path, key: str) -> ctypes.CDLL:
    """Compile into a directory, and load; what cannot be loaded does not stay."""
    with tempfile.TemporaryDirectory(prefix=store.BUILDING, dir=directory) as place:
        made = Path(place) / "kernels.so"
        _compile(compiler, made)
        path = store.put(made, directory, key)
    try:
        library = _load(path)
    except BuildError:
        path.unlink(missing_ok=True)
        raise
    store.remove_unused(directory)
    return library


def _compile(compiler: list[str], out: Path) -> None:
    """Try the variants in turn."""
    name = shlex.join(compiler)
    said = ""
    _run([*compiler, "--version"], out.parent, ANSWER_SECONDS)
    for variant in VARIANTS:
        source = str(SOURCES / "corematching.c")
        command = [*compiler, *FLAGS, *variant, "-o", str(out), source, "-lm"]
        code, message = _run(command, out.parent, COMPILE_SECONDS)
        if code == 0 and out.is_file():
            log.info("compiled the native kernels with '%s %s'", name, " ".join(variant))
            return
        said = said or message
    raise BuildError(f"'{name}' failed: {said.splitlines()[0] if said else 'no message'}")


def _run(command: list[str], place: Path, seconds: int) -> tuple[int, str]:
    """The exit code of a command and what it said; it and all that it started end in time."""
    with tempfile.TemporaryFile(dir=place) as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError as error:
            raise BuildError(f"'{command[0]}' did not run: {error}") from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"'{command[0]}' did not end within {seconds} seconds: check CC"
            ) from error
        finally:
            _end_group(process)
        said.seek(0)
        return code, said.read().decode(errors="replace").strip()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _load(path: Path) -> ctypes.CDLL:
    """Load the library; torch has loaded its OpenMP runtime by now, which is then shared."""
    try:
        return declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} is no library of these kernels: {error}") from error


def _compiler() -> list[str]:
    """The words of the command that compiles."""
    if sys.platform == "win32":
        raise BuildError("no native build on Windows yet")
    chosen = os.environ.get("CC", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"CC={chosen!r} is no command: {error}") from error
    for command in (words, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C compiler found: install one (gcc or clang), or set CC")


def _key(compiler: list[str]) -> str:
    """What tells builds apart: sources, flags, compiler and processor."""
    digest = hashlib.sha256()
    for part in (repr((FLAGS, VARIANTS)), shlex.join(compiler), platform.machine(), _cpu()):
        digest.update(part.encode() + b"\0")
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.c")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What tells machines apart that share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(kept)))
