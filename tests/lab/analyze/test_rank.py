"""Ranks, rank correlation and recovery, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.lab.analyze import correlate_ranks, measure_recovery, rank_values


def test_ranks_of_ties_are_their_mean():
    assert rank_values([10, 30, 20]).tolist() == [1, 3, 2]
    assert rank_values([5, 1, 5, 5]).tolist() == [3, 1, 3, 3]
    assert rank_values([2, 2, 1, 3, 3]).tolist() == [2.5, 2.5, 1, 4.5, 4.5]


def test_correlation_without_ties():
    """1 - 6 * sum d^2 / (n (n^2 - 1)), with d = (1, -1, 0, 0)."""
    assert correlate_ranks([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert correlate_ranks([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert correlate_ranks([1, 2, 3], [3, 0, -9]) == pytest.approx(-1)


def test_correlation_with_ties():
    """Ranks (1.5, 1.5, 3, 4) and (1, 2, 3, 4): covariance 4.5, variances 4.5 and 5."""
    assert correlate_ranks([0, 0, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_constant_values_have_no_order():
    assert correlate_ranks([1, 1, 1], [1, 2, 3]) is None
    assert correlate_ranks([4], [5]) is None
    assert correlate_ranks([], []) is None


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_only_the_order_counts(pairs):
    x, y = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    plain = correlate_ranks(x, y)
    if plain is None:
        assert len(set(x)) == 1 or len(set(y)) == 1
        return
    assert -1 <= plain <= 1
    assert correlate_ranks(y, x) == pytest.approx(plain)
    assert correlate_ranks(np.exp(x), 3 * y + 1) == pytest.approx(plain)
    assert correlate_ranks(-x, y) == pytest.approx(-plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1, 2], "one length"), ([1, 2, np.nan], "NaN or infinite"), ([1, 2, np.inf], "NaN")],
)
def test_values_that_cannot_be_ranked(values, message):
    with pytest.raises(ConfigError, match=message):
        correlate_ranks(values, [1, 2, 3])


def test_recovery_is_the_share_found_again():
    assert measure_recovery([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert measure_recovery([7], [7]) == 1
    assert measure_recovery([], [7]) == 0
    with pytest.raises(ConfigError, match="undefined"):
        measure_recovery([1], [])
