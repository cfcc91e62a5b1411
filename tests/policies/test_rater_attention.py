"""SparseVLM's raters, their attention, and recycling."""

import math

import pytest
import torch

from corematching.errors import ConfigError
from corematching.policies.recycling import cluster_by_density, recycle_dropped
from corematching.policies.token_scores.rater_attention import RaterAttention, choose_raters

from .views import make_view

# one text token before the picture, two image tokens, three of the question
EMBEDDINGS = torch.tensor(
    [[[50.0, 50.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 5.0], [1.0, -5.0]]]
)


def scene(**parts):
    return make_view(["tiittt"], embeddings=EMBEDDINGS, **parts)


def test_raters_by_hand():
    # softmax over the question: image 1 (2, 0, 1), image 2 (6, 0, 3);
    # r = (.665 + .950, .090 + .002, .245 + .047) / 2, mean 1/3: only the first is above
    a = [math.exp(x) for x in (2, 0, 1)]
    b = [math.exp(x) for x in (6, 0, 3)]
    r = [(x / sum(a) + y / sum(b)) / 2 for x, y in zip(a, b, strict=True)]
    assert [x > 1 / 3 for x in r] == [True, False, False]
    assert choose_raters(scene()).tolist() == [[False, False, False, True, False, False]]


def test_without_a_rater_above_the_mean_the_question_rates():
    view = make_view(["iit", "tii"], embeddings=torch.randn(2, 3, 4))
    assert choose_raters(view).tolist() == [[False, False, True], [True, False, False]]


def test_score_is_the_mean_over_heads_and_raters():
    asked = []

    def attention(rows):
        asked.append(rows.tolist())
        heads = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0, 0.0]], [[0.3, 0.4, 0.1, 0.2, 0.0, 0.0]]])
        return heads[None]

    result = RaterAttention()(scene(attention=attention))
    torch.testing.assert_close(result[0, 1:3], torch.tensor([0.3, 0.2]))
    assert asked == [[[3]]]  # only the rater's row


def test_raters_are_chosen_once_and_found_again():
    rows_asked = []

    def attention(rows):
        rows_asked.append(rows.tolist())
        return torch.full((1, 2, rows.shape[1], 6), 0.1)

    memory = {}
    RaterAttention()(scene(attention=attention, memory=memory))

    def fewer(rows):
        rows_asked.append(rows.tolist())
        return torch.full((1, 2, rows.shape[1], 5), 0.1)

    # one image token is gone, and the embeddings are others: the rater is at 2 now
    later = make_view(
        ["tittt"], embeddings=torch.randn(1, 5, 2), attention=fewer, memory=memory, layer=9
    )
    RaterAttention()(later)
    assert rows_asked == [[[3]], [[2]]]


def test_samples_with_other_numbers_of_raters():
    embeddings = torch.cat([EMBEDDINGS, EMBEDDINGS.clone()])
    embeddings[1, 4:] = torch.tensor([2.0, 0.0])  # all three alike: two raters or three
    embeddings[1, 5] = torch.tensor([-9.0, 0.0])
    view = make_view(["tiittt", "tiittt"], embeddings=embeddings)
    assert choose_raters(view).sum(1).tolist() == [1, 2]
    per_row = torch.arange(6.0).view(1, 6, 1).expand(2, 6, 6)  # row r attends r everywhere

    def attention(rows):
        return per_row.gather(1, rows.unsqueeze(2).expand(-1, -1, 6)).unsqueeze(1)

    view.attention = attention
    result = RaterAttention()(view)
    assert result[:, 1].tolist() == [3.0, 3.5]


@pytest.mark.parametrize("missing", ["attention", "embeddings"])
def test_a_missing_part_is_named(missing):
    parts = {"attention": lambda rows: torch.zeros(1, 1, 1, 6)}
    view = scene(**parts)
    setattr(view, missing, None)
    with pytest.raises(ConfigError, match=f"shows no {missing}"):
        RaterAttention()(view)


def test_clusters_by_hand():
    # two groups on a line, k = 2: densities exp(-.5), exp(-.5), 1 and 1, the latter two equal
    features = torch.tensor([[0.0], [1.0], [10.0], [10.0]])
    heads, members = cluster_by_density(features, 2)
    assert sorted(heads.tolist()) == [0, 2]  # of equally dense ones the first
    assert members[2] == members[3] != members[0] == members[1]


def test_recycling_by_hand():
    # the four best of nine dropped tokens: floor(.4 * 9) + 1; floor(4 / 3) + 1 = 2 clusters
    values = [0.0, 1.0, 10.0, 10.0, 500.0, 500.0, 500.0, 500.0, 500.0, 7.0]
    hidden = torch.tensor(values).view(1, 10, 1)
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 99.0]])
    dropped = torch.tensor([[True] * 9 + [False]])
    centres, merged = recycle_dropped(hidden, scores, dropped, ratio=0.4, per_cluster=3)
    assert centres.nonzero()[:, 1].tolist() == [0, 2]
    assert merged[0, [0, 2], 0].tolist() == [0.5, 10.0]
    untouched = [1, 3, 4, 5, 6, 7, 8, 9]
    assert merged[0, untouched].equal(hidden[0, untouched])


def test_recycling_counts_of_the_released_code():
    hidden = torch.randn(2, 300, 4)
    dropped = torch.zeros(2, 300, dtype=torch.bool)
    dropped[0, :276] = True  # 300 of 576 kept
    centres, merged = recycle_dropped(hidden, torch.rand(2, 300), dropped)
    assert centres.sum(1).tolist() == [9, 0]  # floor(.3 * 276) + 1 = 83, floor(83 / 10) + 1
    assert merged[1].equal(hidden[1]) and not (centres & ~dropped).any()


def test_recycling_one_token_keeps_it():
    hidden = torch.randn(1, 2, 3)
    centres, merged = recycle_dropped(hidden, torch.rand(1, 2), torch.tensor([[False, True]]))
    assert centres.tolist() == [[False, True]]
    torch.testing.assert_close(merged, hidden)
