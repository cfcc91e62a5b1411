"""Thresholds of TEAL and CATS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policies import thresholds
from corematching.policies.thresholds import (
    _calibrate_at_once,
    calibrate_threshold,
    find_cut,
)

VALUES = torch.tensor([[[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0], [99.0, 99.0, 99.0, 99.0]]])
TOKENS = torch.tensor([[True, True, False]])


@pytest.mark.parametrize(
    ("sparsity", "threshold"), [(0.5, 4), (0.25, 2), (0.3, 3), (1.0, 8), (0.01, 1)]
)
def test_threshold_by_hand(sparsity, threshold):
    assert calibrate_threshold(VALUES, TOKENS, sparsity).tolist() == [threshold]


def test_thresholds_over_some_neurons_by_hand():
    values = torch.cat([VALUES, VALUES])
    tokens = torch.cat([TOKENS, TOKENS])
    neurons = torch.tensor([[0, 2], [1, 3]])  # 1, 3, 5, 7 and 2, 4, 6, 8
    assert calibrate_threshold(values, tokens, 0.5, neurons).tolist() == [3, 4]
    cuts = find_cut(values, tokens, 0.25, neurons)
    assert 5 < cuts[0] < 5.001 and 6 < cuts[1] < 6.001


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 100), sparsity=st.floats(0.05, 1.0))
def test_at_least_the_sparsity_falls_away(seed, sparsity):
    values = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))
    tokens = torch.tensor([[True] * 5, [False, True, True, False, True]])
    thresholds = calibrate_threshold(values, tokens, sparsity)
    above = (values.abs() > thresholds.view(-1, 1, 1)) & tokens.unsqueeze(-1)
    ratio = above.sum((1, 2)) / (12 * tokens.sum(1))
    one = 1 / (12 * tokens.sum(1))
    assert (ratio <= 1 - sparsity + 1e-5).all()
    assert (ratio > 1 - sparsity - one - 1e-5).all()  # and not one neuron more than needed


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 4), (0.25, 2), (1.0, 8)])
def test_cut_by_hand(ratio, kept):
    cut = find_cut(VALUES, TOKENS, ratio)
    assert int((VALUES[:, :2].abs() >= cut).sum()) == kept


def test_zeros_fall_away_under_a_cut():
    cut = find_cut(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]), torch.tensor([[True]]), 0.5)
    assert 0 < cut.item() < 1e-30
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert find_cut(VALUES, none, 0.5).tolist() == [0]


def test_equal_values_all_fall_away():
    values = torch.ones(1, 2, 4)
    tokens = torch.ones(1, 2, dtype=torch.bool)
    threshold = calibrate_threshold(values, tokens, 0.1)
    assert threshold.tolist() == [1] and not (values > threshold).any()


def test_padding_and_company_change_nothing():
    values = torch.randn(2, 4, 8)
    values[0, 0] = torch.nan
    tokens = torch.tensor([[False, True, True, True], [True] * 4])
    both = calibrate_threshold(values.bfloat16(), tokens, 0.4)
    alone = calibrate_threshold(values[:1, 1:].bfloat16(), tokens[:1, 1:], 0.4)
    assert both[0] == alone[0] and both.dtype == torch.float32


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 1.0])
def test_every_way_gives_the_same(sparsity, monkeypatch):
    values = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor([[True] * 5, [False, True, True, False, True], [False] * 5])
    neurons = torch.stack([torch.randperm(12)[:7] for _ in range(3)])
    for chosen in (None, neurons):
        found = calibrate_threshold(values, tokens, sparsity, chosen)
        with monkeypatch.context() as patch:
            patch.setattr(thresholds, "find_size", lambda *_: None)
            assert torch.equal(calibrate_threshold(values, tokens, sparsity, chosen), found)
        ranks = (tokens.sum(1) * (12 if chosen is None else 7) * sparsity - 1e-6).ceil().long()
        assert torch.equal(_calibrate_at_once(values, tokens, ranks, chosen), found)


def test_no_tokens():
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert calibrate_threshold(VALUES, none, 0.5).tolist() == [0]


def test_wrong_input_is_refused():
    with pytest.raises(ConfigError, match=r"sparsity=0: give a ratio in \(0, 1\]"):
        calibrate_threshold(VALUES, TOKENS, 0)
    with pytest.raises(ConfigError, match="sample 0 hold NaN or infinite"):
        calibrate_threshold(torch.full_like(VALUES, torch.inf), TOKENS, 0.5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_sample_leaves_the_others_alone(bad, caplog):
    values = torch.stack([VALUES[0], torch.full_like(VALUES[0], bad), VALUES[0]])
    tokens = TOKENS[:1].expand(3, -1).clone()
    expected = calibrate_threshold(VALUES[:1], TOKENS[:1], 0.5).item()
    assert calibrate_threshold(values, tokens, 0.5).tolist() == [expected, 0, expected]
    assert "activations of sample 1 hold NaN or infinite values" in caplog.text
    tokens[0] = tokens[2] = False
    with pytest.raises(ConfigError, match="sample 1 hold NaN"):
        calibrate_threshold(values, tokens, 0.5)
