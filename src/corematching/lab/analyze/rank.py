"""Rank correlation and the overlap of two choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corematching.errors import ConfigError


def rank_values(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, ascending; equal values share the mean of their ranks.

    Parameters
    ----------
    values : array-like
        (N,) finite numbers.

    Returns
    -------
    ndarray
        (N,) float64.
    """
    _, group, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)  # the highest rank within each group of equal values
    return (last - (sizes - 1) / 2)[group]


def correlate_ranks(values: ArrayLike, others: ArrayLike) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, so that ties count as ties.

    Parameters
    ----------
    values, others : array-like
        (N,) finite numbers each.

    Returns
    -------
    float or None
        In [-1, 1]; None where either is constant, since there is then no order to compare.

    Raises
    ------
    ConfigError
        The two are of different lengths, or hold NaN or infinite values.
    """
    x, y = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ConfigError(f"ranks of {x.shape} and {y.shape} values: give two rows of one length")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError(
            "values to rank are NaN or infinite: check the model's dtype for overflow"
        )
    if not len(x):
        return None
    a, b = (ranks - ranks.mean() for ranks in (rank_values(x), rank_values(y)))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale > 0 else None


def measure_recovery(chosen: Sequence[int], wanted: Sequence[int]) -> float:
    """``|chosen & wanted| / |wanted|``, the ratio of one choice that another one contains.

    Raises
    ------
    ConfigError
        Nothing is wanted.
    """
    if not len(wanted):
        raise ConfigError("the recovery of an empty choice is undefined: want at least one")
    return len(set(chosen) & set(wanted)) / len(set(wanted))
