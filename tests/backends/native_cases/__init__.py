"""Calls of the C kernels with random shapes, and what they give in float64.

Shared by the fuzz tests: of the Python boundary (test_boundary_fuzz.py) and of the C code under
sanitizers (fuzz_native.py). A case has tensors by name, so that one can be changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from corematching.backends.cpu import native as n

from .base import Case, Draw, is_close
from .prompts import attention, gated, products, prompt_layer, several
from .rows import marked, normalised, picked, ranked, rotated, sums, weighed
from .tokens import ffn_of_a_token, linear_of_a_token, step

__all__ = ["Case", "Draw", "is_close", "list_makers"]

PORTABLE = [
    linear_of_a_token,
    ffn_of_a_token,
    step,
    functools.partial(products, unit=n.VECTORS),
    functools.partial(gated, unit=n.VECTORS),
    functools.partial(several, unit=n.VECTORS),
    normalised,
    rotated,
    sums,
    weighed,
    marked,
    picked,
    ranked,
]
TILED = [
    functools.partial(products, unit=n.TILES),
    functools.partial(gated, unit=n.TILES),
    functools.partial(several, unit=n.TILES),
    attention,
    prompt_layer,
]


def list_makers() -> list[Callable[[Draw], Case]]:
    """What makes the cases that this machine's library can run."""
    return [*PORTABLE, *(TILED if n.has_tiles() else [])]
