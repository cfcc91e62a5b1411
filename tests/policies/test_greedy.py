"""Greedy sets against hand-computed cases and brute force."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policies.budgets import Count, Ratio
from corematching.policies.greedy import (
    cosine_similarity,
    order_by_distance,
    order_by_volume,
    rank_picks,
    resolve_amount,
)
from corematching.policies.token_scores.cdpruner import CDPrunerScore
from corematching.policies.token_scores.divprune import DivPruneScore
from corematching.policies.token_scores.stride import StrideScore

from .views import make_view


def line(*points):
    """Distances of points on a line."""
    at = torch.tensor([points], dtype=torch.float32)
    return (at.unsqueeze(1) - at.unsqueeze(2)).abs()


def everything(count):
    return torch.ones(1, count, dtype=torch.bool)


def test_distance_by_hand():
    # nearest neighbours: 0:1, 1:1, 4:3, 9:5 -> 9 first; then 0 (9 away), then 4 (min(4, 5))
    order = order_by_distance(line(0, 1, 4, 9), everything(4), torch.tensor([3]))
    assert order.tolist() == [[1, 4, 2, 0]]


def test_distance_takes_the_first_of_equal_ones():
    order = order_by_distance(line(0, 2, 4), everything(3), torch.tensor([3]))
    assert order.tolist() == [[0, 2, 1]]


def test_distance_sees_only_the_tokens_to_choose_from():
    among = torch.tensor([[False, True, True, False, True]])
    order = order_by_distance(line(100, 0, 1, -100, 5), among, torch.tensor([2]))
    assert order.tolist() == [[5, 1, 5, 5, 0]]


def test_volume_by_hand():
    # gains 4, 3, 1; after token 0: 3 - 3.4^2 / 4 = 0.11 and 1 - 0 = 1
    kernel = torch.tensor([[[4.0, 3.4, 0.0], [3.4, 3.0, 0.1], [0.0, 0.1, 1.0]]])
    assert order_by_volume(kernel, everything(3), torch.tensor([2])).tolist() == [[0, 3, 1]]


def test_volume_goes_on_when_none_is_left():
    kernel = torch.ones(1, 4, 4)
    order = order_by_volume(kernel, everything(4), torch.tensor([4]))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 200))
def test_volume_is_the_greedy_determinant(seed):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()
    kernel = x @ x.T
    picked: list[int] = []
    for _ in range(4):
        free = [i for i in range(6) if i not in picked]
        sets = [kernel[[*picked, i]][:, [*picked, i]] for i in free]
        picked.append(free[max(range(len(free)), key=lambda n: torch.linalg.det(sets[n]).item())])
    order = order_by_volume(kernel[None], everything(6), torch.tensor([4]))
    assert order[0].argsort(stable=True)[:4].tolist() == picked


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 200), count=st.integers(2, 4))
def test_distance_is_within_half_of_the_best_set(seed, count):
    x = torch.rand(7, 2, generator=torch.Generator().manual_seed(seed))
    distance = torch.cdist(x, x)

    def smallest(chosen):
        return min(distance[i, j].item() for i, j in combinations(chosen, 2))

    order = order_by_distance(distance[None], everything(7), torch.tensor([count]))
    chosen = (order[0] < count).nonzero().squeeze(1).tolist()
    assert len(chosen) == count
    # from any starting point but the best one the greedy choice keeps half of the optimum
    assert smallest(chosen) >= max(map(smallest, combinations(range(7), count))) / 2 - 1e-6


def test_counts_differ_in_a_batch():
    distance = line(0, 1, 4, 9).expand(3, -1, -1)
    among = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]])
    order = order_by_distance(distance, among, torch.tensor([2, 0, 1]))
    assert order.tolist() == [[1, 4, 4, 0], [4, 4, 4, 4], [0, 4, 4, 4]]
    kernel = torch.eye(4).expand(3, -1, -1)
    order = order_by_volume(kernel, among, torch.tensor([2, 0, 1]))
    assert order.tolist() == [[0, 1, 4, 4], [4, 4, 4, 4], [0, 4, 4, 4]]


def test_amounts():
    totals = torch.tensor([0, 3, 10])
    assert resolve_amount(0.25, None, totals).tolist() == [0, 1, 3]
    assert resolve_amount(None, 4, totals).tolist() == [0, 3, 4]


def test_cosine_of_a_zero_vector_is_zero():
    similarity = cosine_similarity(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [4.0, 3.0]]]))
    assert similarity[0, 0].tolist() == [0, 0, 0]
    assert similarity[0, 1, 2].item() == pytest.approx(24 / 25)


def test_rank_falls_in_the_order_of_picking():
    features = torch.zeros(1, 3, 2)
    assert rank_picks(torch.tensor([[1, 3, 0]]), features).tolist() == [[2, 0, 3]]


ANGLES = [0, 10, 90, 180]


def directions(*degrees):
    return [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]


def test_divprune_by_hand():
    # distances 1 - cos: the nearest neighbours of 0, 10, 90, 180 degrees are 10, 0, 10, 90 degrees;
    # 180 first (1 away), then 0 (2 away), then 90
    embeddings = torch.tensor([[[9.0, 9.0], *directions(*ANGLES), [9.0, 9.0]]])
    view = make_view(["tiiiit"], embeddings=embeddings, layer=-1)
    scores = DivPruneScore(keep_tokens=3)(view)
    assert scores[0, 1:5].tolist() == [5, 0, 4, 6]
    keep = Count(3)(scores, view.image)
    assert keep.tolist() == [[False, True, False, True, True, False]]


def test_divprune_ignores_length_and_text():
    embeddings = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    view = make_view(["ttiiiiiit"], embeddings=embeddings, layer=-1)
    scaled = embeddings * torch.linspace(0.5, 9, 9).view(1, -1, 1)
    scaled[:, :2] = 7.0
    other = make_view(["ttiiiiiit"], embeddings=scaled, layer=-1)
    assert DivPruneScore(0.5)(view)[view.image].equal(DivPruneScore(0.5)(other)[view.image])


def test_cdpruner_relevance_by_hand():
    # cosines with the question (1, 0): 1, 0.6, -1
    embeddings = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [3.0, 4.0], [-5.0, 0.0], [4.0, 0.0]]])
    view = make_view(["tiiit"], embeddings=embeddings, layer=-1)
    relevance = CDPrunerScore().measure_relevance(view)
    expected = torch.tensor([[0.0, 1.0, 0.8, 0.0, 0.0]])
    torch.testing.assert_close(relevance, expected, atol=1e-6, rtol=0)


def test_cdpruner_by_hand():
    # relevance (1, .8, 0); S of the first two .6: kernel diagonal 1, .64, 0
    embeddings = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [3.0, 4.0], [-5.0, 0.0], [4.0, 0.0]]])
    view = make_view(["tiiit"], embeddings=embeddings, layer=-1)
    assert CDPrunerScore(keep_tokens=2)(view)[0, 1:4].tolist() == [5, 4, 0]


def test_cdpruner_prefers_the_relevant_of_two_alike():
    embeddings = torch.tensor([[[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    view = make_view(["iiit"], embeddings=embeddings, layer=-1)
    keep = Count(1)(CDPrunerScore(keep_tokens=1)(view), view.image)
    assert keep.tolist() == [[False, True, False, False]]


def test_cdpruner_with_equal_relevance_is_a_plain_dpp():
    embeddings = torch.tensor(
        [[[0.0, 1.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    )
    view = make_view(["iiit"], embeddings=embeddings, layer=-1)
    assert CDPrunerScore().measure_relevance(view).tolist() == [[1, 1, 1, 0]]
    keep = Count(2)(CDPrunerScore(keep_tokens=2)(view), view.image)
    assert keep.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    "score", [DivPruneScore(0.5), CDPrunerScore(0.5), StrideScore(0.5)], ids=repr
)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 50), pad=st.integers(1, 4))
def test_padding_and_company_change_nothing(score, seed, pad):
    kinds, rng = "ttiiiiiitt", torch.Generator().manual_seed(seed)
    embeddings = torch.randn(1, 10, 8, generator=rng)
    single = make_view([kinds], embeddings=embeddings, layer=-1)
    filler = torch.full((1, pad, 8), torch.nan)
    other = torch.randn(1, 10 + pad, 8, generator=rng)
    both = make_view(
        ["." * pad + kinds, "iii" + "t" * (7 + pad)],
        embeddings=torch.cat([torch.cat([filler, embeddings], 1), other]),
        layer=-1,
    )
    alone = Ratio(0.5)(score(single), single.image)
    together = Ratio(0.5)(score(both), both.image)
    assert together[0, pad:].equal(alone[0]) and alone.sum() == 3


@pytest.mark.parametrize("score", [DivPruneScore(1.0), CDPrunerScore(1.0)], ids=repr)
def test_broken_features_are_refused_by_the_budget(score):
    embeddings = torch.randn(1, 5, 4)
    embeddings[0, 2, 1] = torch.nan
    view = make_view(["tiiit"], embeddings=embeddings, layer=-1)
    with pytest.raises(ConfigError, match="token scores of sample 0 hold NaN or infinite values"):
        Ratio(0.5)(score(view), view.image)


@pytest.mark.parametrize("score", [DivPruneScore(), CDPrunerScore(), StrideScore()], ids=repr)
def test_one_image_token_none_and_all_alike(score):
    view = make_view(["ttttt", "ttitt", "tiiit"], embeddings=torch.ones(3, 5, 4), layer=-1)
    keep = Ratio(0.4)(score(view), view.image)
    assert keep.sum(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [
        (2, 8, [2, 6]),
        (3, 8, [1, 4, 6]),
        (8, 8, list(range(8))),
        (9, 8, list(range(8))),
        (1, 8, [4]),
    ],
)
def test_stride_by_hand(first, total, expected):
    # floor((i + 1/2) * N / K)
    view = make_view(["t" + "i" * total + "t"])
    scores = StrideScore(keep_tokens=first)(view)[0, 1:-1]
    assert scores.nonzero().squeeze(1).tolist() == expected


@settings(deadline=None, max_examples=25)
@given(total=st.integers(1, 60), share=st.floats(0.01, 1.0))
def test_stride_and_its_budget_agree(total, share):
    view = make_view(["i" * total])
    scores = StrideScore(share)(view)
    kept = Ratio(share)(scores, view.image)
    assert kept.equal(scores == 1)


@pytest.mark.parametrize("make", [StrideScore, DivPruneScore, CDPrunerScore])
def test_parameters_out_of_range_are_refused(make):
    for ratio in (0, 1.5, -1, True):
        with pytest.raises(ConfigError, match="keep_ratio="):
            make(keep_ratio=ratio)
    for count in (0, 1.5, -1, True):
        with pytest.raises(ConfigError, match="keep_tokens="):
            make(keep_tokens=count)
    with pytest.raises(ConfigError, match="exclude each other"):
        make(keep_ratio=0.5, keep_tokens=2)
    with pytest.raises(ConfigError, match="did you mean 'question'"):
        CDPrunerScore(token_set="questoin")
