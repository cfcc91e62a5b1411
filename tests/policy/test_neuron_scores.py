"""Neuron scores against hand-computed cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policy import (
    CoreInferScore,
    GriffinScore,
    Magnitude,
    NeuronScore,
    OutputWeighted,
    PaperScore,
    RandomNeurons,
    names,
    neuron_score_by_name,
)

from .views import make_view, pad_left

TOKENS = [[3.0, -4.0, 0.0], [0.0, 0.0, 2.0], [6.0, 0.0, 8.0]]
ALL = [
    GriffinScore(),
    GriffinScore(token_set="question"),
    Magnitude(),
    Magnitude(token_set="text"),
    OutputWeighted(),
    PaperScore(),
    PaperScore(token_set="image"),
    CoreInferScore(),
]


def test_griffin_by_hand():
    # unit rows (.6, -.8, 0), (0, 0, 1), (.6, 0, .8)
    expected = [[math.sqrt(0.72), 0.8, math.sqrt(1.64)]]
    torch.testing.assert_close(GriffinScore()(make_view(["tit"], [TOKENS])), torch.tensor(expected))
    text_only = [[math.sqrt(0.72), 0.8, 0.8]]
    view = make_view(["tit"], [TOKENS])
    torch.testing.assert_close(GriffinScore(token_set="text")(view), torch.tensor(text_only))


def test_magnitude_by_hand():
    view = make_view(["tit"], [TOKENS])
    assert Magnitude(top_ratio=0.3)(view).tolist() == [[0, 1, 2]]
    assert Magnitude(top_ratio=0.7)(view).tolist() == [[2, 1, 2]]


def test_paper_by_hand():
    # positives {0}, {2}, {2, 0}; rho 0.5 of two is the first
    assert PaperScore(top_ratio=0.5)(make_view(["tit"], [TOKENS])).tolist() == [[1, 0, 2]]
    assert PaperScore(top_ratio=1.0)(make_view(["tit"], [TOKENS])).tolist() == [[2, 0, 2]]


def test_coreinfer_by_hand():
    # 2, 1 and 2 positives
    view = make_view(["itt"], [[[3.0, 1.0, -1.0], [0.0, 0.0, 2.0], [6.0, 0.0, 8.0]]])
    assert CoreInferScore(top_ratio=0.8)(view).tolist() == [[1, 0, 2]]  # mean 5 / 3, k = 1
    assert CoreInferScore(top_ratio=1.0, token_set="text")(view).tolist() == [
        [0, 0, 2]
    ]  # mean 3 / 2, k = 1


def test_output_weighted_by_hand():
    down_proj = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 0.0]])  # column norms 5, 1, 1
    result = OutputWeighted()(make_view(["tit"], [TOKENS], down_proj=down_proj))
    torch.testing.assert_close(result, torch.tensor([[3.0 * 5, 4 / 3, 10 / 3]]))


def test_output_weighted_without_the_weight_is_refused():
    with pytest.raises(ConfigError, match="down_proj"):
        OutputWeighted()(make_view(["tit"], [TOKENS]))


def test_random_neurons_differ_by_layer_seed_and_sample():
    a, seed = torch.ones(2, 3, 32), torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 3, 8, generator=seed)  # of others one pair in 64 is alike
    base = RandomNeurons()(make_view(["tit"] * 2, a, embeddings=embeddings))
    assert base.shape == (2, 32) and not torch.equal(base[0], base[1])
    one = make_view(["tit"], 2 * a[:1], embeddings=embeddings[:1])
    assert torch.equal(base[:1], RandomNeurons()(one))
    assert not torch.equal(base[:1], RandomNeurons(seed=3)(one))
    one.layer = 5
    assert not torch.equal(base[:1], RandomNeurons()(one))


def test_scores_over_the_kept_tokens():
    view = make_view(["tiit"], torch.rand(1, 4, 8))
    everything = GriffinScore(token_set="kept")(view)
    assert everything.equal(GriffinScore()(view))
    view.kept = torch.tensor([[True, False, True, True]])
    without = make_view(["tit"], view.activations[:, [0, 2, 3]])
    torch.testing.assert_close(GriffinScore(token_set="kept")(view), GriffinScore()(without))


@pytest.mark.parametrize("score", ALL, ids=repr)
@given(seed=st.integers(0, 50), pad=st.integers(1, 4))
def test_padding_changes_nothing(score, seed, pad):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 6, 16, generator=generator)
    down_proj = torch.randn(4, 16, generator=generator)
    view = make_view(["ttiitt", "tiiitt"], a, down_proj=down_proj)
    padded = pad_left(view, pad, filler=float("nan"))
    torch.testing.assert_close(score(padded), score(view))
    second = make_view(["tiiitt"], a[1:], down_proj=down_proj)
    torch.testing.assert_close(score(view)[1:], score(second))


@pytest.mark.parametrize("score", ALL, ids=repr)
@given(seed=st.integers(0, 50), random=st.randoms())
def test_scores_follow_a_permutation_of_the_neurons(score, seed, random):
    generator = torch.Generator().manual_seed(seed)
    a, down_proj = (
        torch.randn(1, 5, 16, generator=generator),
        torch.randn(4, 16, generator=generator),
    )
    order = list(range(16))
    random.shuffle(order)
    before = score(make_view(["tiitt"], a, down_proj=down_proj))
    after = score(make_view(["tiitt"], a[..., order], down_proj=down_proj[:, order]))
    torch.testing.assert_close(after, before[:, order])


@pytest.mark.parametrize("score", ALL, ids=repr)
def test_no_positive_activation(score):
    for a in (-torch.ones(1, 3, 8), torch.zeros(1, 3, 8)):
        result = score(make_view(["tit"], a, down_proj=torch.ones(2, 8)))
        assert result.shape == (1, 8) and result.float().isfinite().all()


@pytest.mark.parametrize("name", names("neuron score"))
def test_round_trip(name):
    score = neuron_score_by_name(name)
    assert NeuronScore.from_dict(score.to_dict()) == score


@pytest.mark.parametrize(
    "make",
    [
        lambda: PaperScore(top_ratio=0),
        lambda: Magnitude(top_ratio=1.5),
        lambda: GriffinScore(token_set="everything"),
        lambda: OutputWeighted(token_set=""),
        lambda: RandomNeurons(seed=-2),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()
