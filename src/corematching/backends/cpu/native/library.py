"""The compiled kernels, for the fastest instruction set that this processor runs.

The extension module has the kernels once for each instruction set that the compiler knew. Two
environment variables choose: ``CORE_MATCHING_NATIVE=0`` turns the kernels off, and
``CORE_MATCHING_ISA`` names the instruction set to use instead of the fastest one.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # loads its OpenMP runtime first, which the extension then shares
from torch import Tensor

from corematching.errors import ConfigError

try:
    from corematching.backends.cpu import _kernels
except ImportError as error:
    compiled: Any = None
    missing = str(error)
else:
    compiled, missing = _kernels, ""

log = logging.getLogger(__name__)

SWITCH, CAP = "CORE_MATCHING_NATIVE", "CORE_MATCHING_ISA"
INSTALL_HINT = "install a C++17 compiler (g++ or clang++), then corematching again"
MAX_BATCH = 16
"""The most rows of a decode step."""
MAX_GEMMS = 4
"""The most matrices that are multiplied with the same rows in one call."""
DTYPES = (torch.float32, torch.bfloat16)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 2}
ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "quick_gelu": 4}
NO_ACTIVATION = -1

_lock = threading.RLock()
_forced: list[Any] = []


def find_kernels() -> Any:
    """The kernels of the fastest instruction set, or None; says why in the log, once.

    Returns
    -------
    Kernels or None
        None without the extension module, or with ``CORE_MATCHING_NATIVE=0``.

    Raises
    ------
    ConfigError
        ``CORE_MATCHING_ISA`` names an instruction set that this machine lacks.
    """
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return _say_off()
    if _forced:
        return _forced[-1]
    if _find_once.cache_info().currsize:
        return _find_once()  # without the lock, which an interrupt might have left closed
    with _lock:
        return _find_once()


@contextmanager
def use_isa(name: str) -> Iterator[Any]:
    """Use the kernels of one instruction set, in all threads, within a ``with`` block.

    Raises
    ------
    ConfigError
        This machine lacks the instruction set.
    """
    kernels = None if compiled is None else compiled.find(name)
    if kernels is None:
        raise _unknown_isa(f"isa={name!r}")
    _forced.append(kernels)
    try:
        yield kernels
    finally:
        _forced.remove(kernels)


def supported_isas() -> list[str]:
    """The instruction sets with kernels that run here, the best one first."""
    return [] if compiled is None else list(compiled.supported_isas())


def prefers_native(dtype: torch.dtype) -> bool:
    """Whether prompts of a dtype are faster in these kernels than in PyTorch."""
    kernels = find_kernels()
    return kernels is not None and dtype in DTYPES and kernels.isa != "portable"


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=1)
def _say_off() -> None:
    log.info("native kernels are off (%s=0): FFNs run in PyTorch", SWITCH)


@functools.lru_cache(maxsize=1)
def _find_once() -> Any:
    if compiled is None:
        log.warning("no native kernels, FFNs run in PyTorch (%s): %s", missing, INSTALL_HINT)
        return None
    cap = os.environ.get(CAP, "")
    kernels = compiled.find(cap or compiled.best_isa())
    if kernels is None:
        raise _unknown_isa(f"{CAP}={cap!r}")
    log.debug("native kernels for %s", kernels.isa)
    return kernels


def _unknown_isa(what: str) -> ConfigError:
    known = ", ".join(supported_isas()) or "none, since there is no extension module"
    return ConfigError(f"{what}: there are no such kernels for this machine; choose from: {known}")
