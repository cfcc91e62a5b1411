"""Calls of the kernels with random shapes, and what they give in float64.

Shared by the fuzz tests: of the Python boundary (test_boundary_fuzz.py) and of the kernels under
sanitizers (fuzz_native.py). A case has tensors by name, so that one can be changed.
"""

from __future__ import annotations

from .base import Case, Draw, is_close
from .prompts import attention, gated, joint, linear, prefill_layer
from .rows import marked, normalized, picked, ranked, rotated, sums, weighed
from .tokens import ffn_of_a_token, linear_of_a_token, step, step_of_ragged_rows

__all__ = ["MAKERS", "Case", "Draw", "is_close"]

MAKERS = [
    linear_of_a_token,
    ffn_of_a_token,
    step,
    step_of_ragged_rows,
    linear,
    gated,
    joint,
    attention,
    prefill_layer,
    normalized,
    rotated,
    sums,
    weighed,
    marked,
    picked,
    ranked,
]
"""What makes the cases."""
