"""Medians, spreads and pairs, against figures worked out by hand."""

from __future__ import annotations

import pytest

from corematching.errors import ConfigError
from corematching.lab.bench.statistics import compare_pairs, summarise


def test_median_and_percentiles():
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert summary["median"] == 3.0
    assert summary["p10"] == pytest.approx(1.4)  # a tenth of the way over four gaps
    assert summary["p90"] == pytest.approx(4.6)
    assert summary["values"] == [5.0, 1.0, 3.0, 2.0, 4.0]


def test_ratios_are_taken_within_pairs():
    # The machine got twice as slow for the second pair: the ratio of the medians would be 3 / 1.5.
    ratio = compare_pairs(ours=[1.0, 2.0], others=[2.0, 4.0])
    assert ratio["values"] == [2.0, 2.0]
    assert (ratio["median"], ratio["p10"], ratio["p90"]) == (2.0, 2.0, 2.0)


def test_ratio_above_one_means_ours_is_faster():
    ratio = compare_pairs(ours=[1.0, 1.0, 2.0], others=[3.0, 2.0, 2.0])
    assert ratio["values"] == [3.0, 2.0, 1.0]
    assert ratio["median"] == 2.0
    assert ratio["p10"] == pytest.approx(1.2) and ratio["p90"] == pytest.approx(2.8)


def test_unequal_counts_make_no_pairs():
    with pytest.raises(ConfigError, match="measure in turn"):
        compare_pairs([1.0], [1.0, 2.0])
