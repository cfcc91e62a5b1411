"""The phases of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from corematching.runtime.prefill.prefill import Prefill
from corematching.runtime.record import Mark, Record


class Phase(Enum):
    """Phases of a forward pass."""

    PREFILL = "a prompt on an empty cache"
    TURN = "further tokens on a cache"
    STEP = "a hand-written loop's decode step"


@dataclass
class ForwardPass:
    """The forward pass in progress.

    Attributes
    ----------
    phase : Phase
        Its phase.
    start : Mark or None
        Its begin; None in a decode step.
    prefill : Prefill or None
        The prefill of a prompt.
    record : Record or None
        The record of a turn.
    native_layers : int
        The backend's count of native layers at the begin.
    """

    phase: Phase
    start: Mark | None = None
    prefill: Prefill | None = None
    record: Record | None = None
    native_layers: int = 0
