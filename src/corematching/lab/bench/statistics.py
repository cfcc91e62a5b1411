"""Medians, spreads, and ratios pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from corematching.errors import ConfigError


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """The median and the 10th and 90th percentile (linear between values), with the values."""
    low, middle, high = (float(x) for x in np.percentile(values, [10, 50, 90]))
    return {"median": middle, "p10": low, "p90": high, "values": [float(v) for v in values]}


def compare_pairs(ours: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The ratio of the others' times to ours, pair by pair: above 1, ours is faster.

    The i-th values of both were measured right after each other, so what slows the whole machine
    slows both and leaves their ratio alone.

    Raises
    ------
    ConfigError
        There is not one value of the others for each of ours.
    """
    if len(ours) != len(others):
        raise ConfigError(f"{len(ours)} and {len(others)} values make no pairs: measure in turn")
    return summarise([other / own for own, other in zip(ours, others, strict=True)])
