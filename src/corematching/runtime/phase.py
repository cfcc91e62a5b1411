"""The kinds of forward pass, and the one under way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from corematching.runtime.prefill.prefill import Prefill
from corematching.runtime.record import Mark, Record


class Phase(Enum):
    """Kinds of forward pass."""

    PREFILL = "a prompt on an empty cache"
    TURN = "further tokens on a cache"
    STEP = "a hand-written loop's decode step"


@dataclass
class ForwardPass:
    """The forward pass under way.

    Attributes
    ----------
    phase : Phase
        Its kind.
    start : Mark or None
        When it began; not of a step.
    prefill : Prefill or None
        Of a prompt.
    record : Record or None
        Of a turn.
    native_layers : int
        The backend's count of native layers when it began.
    """

    phase: Phase
    start: Mark | None = None
    prefill: Prefill | None = None
    record: Record | None = None
    native_layers: int = 0
