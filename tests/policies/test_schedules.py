"""Schedules: a share per layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policies.schedules import DenseEnds, PerLayer, Uniform


def test_uniform_rounds_to_a_multiple():
    assert Uniform(0.4).counts(3, 1536) == (616, 616, 616)  # 614.4
    assert Uniform(0.4, multiple=1).counts(2, 1536) == (614, 614)
    assert Uniform(0.4, multiple=128).counts(1, 1536) == (640,)
    assert Uniform(0.01).counts(1, 64) == (8,)
    assert Uniform(0.9).counts(1, 6) == (6,)


def test_a_full_share_is_dense_whatever_the_multiple():
    assert Uniform(1.0).counts(2, 100) == (100, 100)


def test_dense_ends_are_coreinfers_layers():
    shares = DenseEnds(0.4).ratios(32)
    assert [layer for layer, share in enumerate(shares) if share < 1] == list(range(6, 27))


def test_dense_ends_scale_with_the_depth():
    ratios = DenseEnds(0.4).ratios(30)
    assert [layer for layer, ratio in enumerate(ratios) if ratio < 1] == list(range(6, 25))
    assert DenseEnds(0.5, first=1, last=2).counts(5, 16) == (16, 8, 8, 16, 16)


def test_ratios():
    assert DenseEnds(0.5, first=1, last=1).ratios(4) == (1.0, 0.5, 0.5, 1.0)
    assert Uniform(0.3).ratios(3) == (0.3, 0.3, 0.3)
    assert PerLayer(layer_ratios=(0.2, 0.6)).ratios(2) == (0.2, 0.6)


def test_per_layer():
    assert PerLayer(layer_ratios=(0.5, 1.0, 0.25)).counts(3, 32) == (16, 32, 8)
    with pytest.raises(ConfigError, match="3 entries, the model has 4"):
        PerLayer(layer_ratios=(0.5, 1.0, 0.25)).counts(4, 32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0.0),
        lambda: Uniform(1.1),
        lambda: Uniform(0.4, multiple=0),
        lambda: DenseEnds(0.4, first=-1),
        lambda: DenseEnds(0.4, first=1.0),
        lambda: DenseEnds(0.4, first=0.6, last=0.5),
        lambda: PerLayer(),
        lambda: PerLayer(layer_ratios=(0.4, 0.0)),
        lambda: DenseEnds(0.4, first=4, last=3).counts(7, 64),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@given(st.floats(0.001, 1.0), st.integers(1, 300), st.integers(1, 64))
def test_counts_stay_in_range(share, width, multiple):
    (count,) = Uniform(share, multiple=multiple).counts(1, width)
    assert 1 <= count <= width
    assert count % multiple == 0 or count == width
