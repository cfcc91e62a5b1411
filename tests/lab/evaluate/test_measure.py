"""Intervals and divergences against hand-computed cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from corematching.lab.evaluate.measure import Bootstrap, condense, kl_from


def test_interval_of_certain_answers_is_a_point():
    bootstrap = Bootstrap(list("abcd"), seed=0)
    assert bootstrap.mean([1, 1, 1, 1]).to_dict() == {"value": 1, "low": 1, "high": 1}


def test_interval_is_near_the_normal_one():
    rights = [i % 5 != 0 for i in range(1000)]
    interval = Bootstrap([str(i) for i in range(1000)], seed=0).mean(rights)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.8 - half, abs=0.004)
    assert interval.high == pytest.approx(0.8 + half, abs=0.004)


def test_questions_of_one_picture_go_together():
    rights = [i < 50 for i in range(100)]
    apart = Bootstrap([str(i) for i in range(100)], seed=0).mean(rights)
    together = Bootstrap([str(i // 10) for i in range(100)], seed=0).mean(rights)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_same_seed_same_interval():
    pictures, values = [str(i) for i in range(40)], [i**0.5 for i in range(40)]
    one, same, other = (Bootstrap(pictures, seed).mean(values) for seed in (3, 3, 4))
    assert one == same != other


def test_ratio_to_itself_is_a_point():
    rights = [1, 0, 1, 0, 1]
    assert Bootstrap(list("abcde"), 0).ratio(rights, rights).to_dict() == {
        "value": 1,
        "low": 1,
        "high": 1,
    }


def test_ratio():
    assert Bootstrap(list("abcd"), 0).ratio([1, 0, 0, 0], [1, 1, 0, 0]).value == 0.5


def test_ratio_to_nothing_is_none():
    assert Bootstrap(list("ab"), 0).ratio([1, 0], [0, 0]) is None


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert kl_from(*condense(p.log(), 3), q.log()).item() == pytest.approx(expected, abs=1e-7)


def test_divergence_with_the_rest_as_one():
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.2, 0.2, 0.5, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert kl_from(*condense(p.log(), 1), q.log()).item() == pytest.approx(expected, abs=1e-6)


def test_divergence_is_bounded_by_the_whole_one():
    torch.manual_seed(0)
    p, q = torch.randn(8, 50), torch.randn(8, 50)
    parts = [kl_from(*condense(p, size), q) for size in (1, 5, 20, 50)]
    whole = (
        p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))
    ).sum(-1)
    assert torch.allclose(parts[-1], whole, atol=1e-6)
    assert all((less <= more + 1e-7).all() for less, more in itertools.pairwise(parts))


def test_divergence_from_itself_is_nothing():
    p = torch.randn(4, 30) * 20
    assert kl_from(*condense(p, 7), p).abs().max() < 1e-6
