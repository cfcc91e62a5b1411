"""Budgets: scores and image mask in, keep mask out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policies.amounts import count_of
from corematching.policies.budgets import (
    Count,
    Knee,
    Ratio,
    measure_chord_distance,
)
from corematching.policies.spread import spread_among, spread_evenly

NAN = float("nan")
whole_scores = st.lists(st.integers(-20, 20), min_size=1, max_size=40)
budgets = st.sampled_from(
    [
        Knee(),
        Knee(strict=False),
        Knee(min_ratio=0.2, max_ratio=0.5),
        Knee(min_tokens=3),
        Ratio(0.3),
        Ratio(1.0),
        Count(4),
        Ratio(0.1, min_tokens=5),
    ]
)


def kept(budget, *samples):
    """The kept positions of each sample; None is a token that is no image token."""
    width = max(map(len, samples))
    rows = [list(sample) + [None] * (width - len(sample)) for sample in samples]
    image = torch.tensor([[score is not None for score in row] for row in rows])
    scores = torch.tensor(
        [[NAN if score is None else float(score) for score in row] for row in rows]
    )
    return [row.nonzero().flatten().tolist() for row in budget(scores, image)]


def test_knee_by_hand():
    # sorted 10 9 8 2 1 0, chord 10 8 6 4 2 0, distances 0 1 2 2 1 0: the first of the farthest
    # is 8, so strict keeps 10 and 9
    assert kept(Knee(), [2, 10, 0, 9, 1, 8]) == [[1, 3]]
    assert kept(Knee(strict=False), [2, 10, 0, 9, 1, 8]) == [[1, 3, 5]]


def test_knee_below_the_chord():
    # sorted 100 10 8 6 0, chord 100 75 50 25 0: distances 0 65 42 19 0
    assert kept(Knee(), [6, 100, 0, 10, 8]) == [[1]]
    assert kept(Knee(strict=False), [6, 100, 0, 10, 8]) == [[1, 3]]


def test_strict_knee_at_the_top_keeps_the_plateau():
    assert kept(Knee(), [0, 5, 5, 0, 5]) == [[1, 2, 4]]


def test_chord_distance_by_hand():
    curve = torch.tensor([[4.0, 3.5, 1.0, 0.0, -torch.inf]])
    distance = measure_chord_distance(curve, torch.tensor([4]))
    expected = torch.tensor([[0.0, 3.5 - 8 / 3, 1 / 3, 0.0, 0.0]])
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize("sample", [[3], [3, 3, 3, 3], [1, 2], [4, 3, 2, 1, 0], [0.1, 0.2, 0.3]])
def test_a_curve_without_knee_keeps_all(sample):
    assert kept(Knee(), sample) == [list(range(len(sample)))]
    assert kept(Knee(strict=False), sample) == [list(range(len(sample)))]


def test_flat_curve_still_obeys_the_most_by_position():
    assert kept(Knee(max_ratio=0.5), [7, 7, 7, 7]) == [[0, 1]]
    assert kept(Knee(max_tokens=3), [7, 7, 7, 7]) == [[0, 1, 2]]


def test_least_as_ratio_and_as_count():
    steep = [100, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert kept(Knee(), steep) == [[0]]
    assert kept(Knee(min_ratio=0.3), steep) == [[0, 1, 2]]
    assert kept(Knee(min_tokens=4), steep) == [[0, 1, 2, 3]]
    assert kept(Knee(min_tokens=64), steep) == [list(range(10))]


def test_ratio_and_count_break_ties_by_position():
    assert kept(Ratio(0.5), [1, 2, 2, 2]) == [[1, 2]]
    assert kept(Count(3), [2, 1, 2, 2, 2]) == [[0, 2, 3]]


def test_samples_have_their_own_number_of_image_tokens():
    assert kept(Ratio(0.5), [None, 1, 9, None, 5, 6], [3, None], [None, None]) == [[2, 5], [0], []]
    assert kept(Count(2), [1, 2, 3], [None, 5], [None, None]) == [[1, 2], [1], []]
    assert kept(Knee(), [1, 9, 1, 1], [None, 5], [None, None]) == [[1], [1], []]


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [Knee(), Ratio(0.5), Count(1)])
def test_broken_scores_are_refused(budget, bad):
    scores = torch.tensor([[bad, 2.0], [1.0, bad]])
    with pytest.raises(ConfigError, match="token scores of sample 0, 1 hold NaN or infinite"):
        budget(scores, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ConfigError, match="token scores of sample 1 hold NaN or infinite"):
        budget(scores, torch.tensor([[False, False], [True, True]]))


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [Knee(), Ratio(0.5), Count(1)])
def test_a_broken_sample_leaves_the_others_alone(budget, bad, caplog):
    scores = torch.tensor([[1.0, 2.0, 0.5, 0.1], [1.0, bad, 3.0, 0.1]])
    image = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(budget(scores, image)[0], budget(scores[:1], image[:1])[0])
    assert "token scores of sample 1 hold NaN or infinite values" in caplog.text
    assert budget(scores, image)[1].any()
    scores = torch.tensor([[1.0, 2.0], [1.0, bad]])
    assert budget(scores, torch.tensor([[True, True], [True, False]]))[1].tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores(dtype):
    scores = torch.tensor([[100, 10, 8, 6, 0]], dtype=dtype)
    assert Knee()(scores, torch.ones(1, 5).bool()).tolist() == [[True] + [False] * 4]


@given(budgets, whole_scores)
def test_what_is_kept_scores_no_less_than_what_is_dropped(budget, sample):
    (positions,) = kept(budget, sample)
    assert positions
    dropped = [(score, -i) for i, score in enumerate(sample) if i not in positions]
    assert not dropped or max(dropped) < min((sample[i], -i) for i in positions)


@given(
    budgets, st.lists(st.integers(-1000, 1000), min_size=1, max_size=40, unique=True), st.randoms()
)
def test_distinct_scores_follow_a_permutation(budget, sample, random):
    order = list(range(len(sample)))
    random.shuffle(order)
    (before,), (after,) = kept(budget, sample), kept(budget, [sample[i] for i in order])
    assert {order[place] for place in after} == set(before)


@given(budgets, whole_scores, whole_scores, st.integers(0, 5))
def test_a_batch_keeps_what_its_singles_keep(budget, one, other, pad):
    padded = [None] * pad + other
    together = kept(budget, one, padded)
    assert together == [kept(budget, one)[0], [pad + i for i in kept(budget, other)[0]]]


@given(whole_scores)
def test_knee_is_the_argmax_of_the_distance_to_the_chord(sample):
    curve = sorted(sample, reverse=True)
    steps = len(curve) - 1
    # integer arithmetic: distances times the number of steps
    distances = [
        abs(y * steps - (curve[0] * steps + i * (curve[-1] - curve[0])))
        for i, y in enumerate(curve)
    ]
    if max(distances) == 0:
        expected = len(curve)
    else:
        cut = curve[distances.index(max(distances))]
        expected = sum(y > cut for y in curve) or sum(y >= cut for y in curve)
    ties = {curve[i] for i, d in enumerate(distances) if d == max(distances)}
    count = len(kept(Knee(), sample)[0])
    if len(ties) == 1:
        assert count == expected
    else:  # float32 may break a tie of distances the other way
        assert count in {sum(y > cut for y in curve) for cut in ties} | {expected, len(curve)}


@given(whole_scores, st.floats(0.01, 1.0), st.integers(1, 50))
def test_least_and_most_bound_the_count(sample, share, floor):
    assert len(kept(Knee(max_ratio=share), sample)[0]) <= count_of(share, len(sample))
    assert len(kept(Knee(min_tokens=floor), sample)[0]) >= min(floor, len(sample))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ratio(0.0),
        lambda: Ratio(1.2),
        lambda: Ratio(-0.1),
        lambda: Ratio(NAN),
        lambda: Ratio(True),
        lambda: Ratio("half"),
        lambda: Count(0),
        lambda: Count(2.5),
        lambda: Knee(min_ratio=0.0),
        lambda: Knee(max_ratio=1.5),
        lambda: Knee(min_ratio=0.5, max_ratio=0.2),
        lambda: Knee(min_tokens=9, max_tokens=3),
        lambda: Knee(strict=1),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_refusals_name_the_fix():
    with pytest.raises(ConfigError, match=r"ratio=1.2: give a ratio in \(0, 1\]"):
        Ratio(1.2)


def test_spread_evenly_takes_the_middles_of_equal_runs():
    image = torch.tensor([[False] + [True] * 8 + [False], [True, False] + [True] * 3 + [False] * 5])
    even = spread_evenly(image, torch.tensor([2, 1]))
    assert even[0].nonzero().flatten().tolist() == [2, 6]
    assert even[1].nonzero().flatten().tolist() == [2]


@given(n=st.integers(1, 60), share=st.floats(0, 1))
def test_spread_evenly_takes_as_many_as_asked_for(n, share):
    count = round(n * share)
    image = torch.ones(1, n, dtype=torch.bool)
    assert spread_evenly(image, torch.tensor([count])).sum() == count


def test_spread_among_takes_what_is_nearest_to_the_middles():
    image = torch.tensor([[True] * 4, [False, True, True, True]])
    places = torch.tensor([[0, 2, 3, 9], [-1, 0, 1, 2]])
    found = spread_among(image, torch.tensor([2, 2]), places, torch.tensor([10, 9]))
    # runs of 5 with the middles 2.5 and 7.5: tokens 2 and 9; then 4.5 each, the second run is empty
    assert found.tolist() == [[False, True, False, True], [False, False, False, True]]
    nothing = spread_among(image, torch.tensor([0, 0]), places, torch.tensor([10, 9]))
    assert not nothing.any()


@given(n=st.integers(1, 60), share=st.floats(0, 1), left=st.floats(0, 1), seed=st.integers(0, 99))
def test_spread_among_is_spread_evenly_where_nothing_is_missing(n, share, left, seed):
    count = torch.tensor([int(share * n)])
    image = torch.ones(1, n, dtype=torch.bool)
    places, total = torch.arange(n).unsqueeze(0), torch.tensor([n])
    even = spread_evenly(image, count)
    assert spread_among(image, count, places, total).equal(even)
    # and where a spread is left that is denser by a token a run, no run of a sparser one is empty
    more = count + int(left * (n - int(count)))
    extra = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) < 0.2
    found = spread_among(spread_evenly(image, more) | extra, count, places, total)
    if int(count) and n / int(count) >= n / int(more) + 1:
        assert int(found.sum()) == int(count)
    assert int(found.sum()) <= int(count)


def test_cover_keeps_the_count_and_fills_up_with_the_highest_scores():
    scores = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]])
    image = torch.ones(1, 8, dtype=torch.bool)
    kept = Count(4, cover=0.5)(scores, image)
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert Count(4)(scores, image)[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cover", [-0.1, 1.0, float("nan")])
def test_cover_out_of_range_is_refused(cover):
    with pytest.raises(ConfigError, match="cover"):
        Ratio(0.5, cover=cover)
