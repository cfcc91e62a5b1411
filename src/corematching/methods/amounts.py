"""Budgets from a method's ``keep``."""

from __future__ import annotations

from corematching.policy.budgets import Budget, Count, Ratio
from corematching.policy.check import check_amount


def budget_of(keep: int | float) -> Budget:
    """`Ratio` for a share (float), `Count` for a number of tokens (int)."""
    check_amount("keep", keep)
    return Ratio(keep) if isinstance(keep, float) else Count(keep)
