"""Token scores against hand-computed cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.policy import (
    Attention,
    CoreOverlap,
    Norm,
    ProjectionScore,
    RandomTokens,
    TextOverlap,
    TokenOverlap,
    TokenScore,
    names,
    score_by_name,
)
from corematching.policy.tokens import select_question
from corematching.protocol import ATTENTION, CONTRIBUTIONS, EMBEDDINGS

from .views import make_view, pad_left

SCENE = [
    [5.0, -1.0, 2.0, -8.0],  # text
    [1.0, 1.0, 6.0, -1.0],  # image
    [-1.0, 3.0, -2.0, 9.0],  # image
    [4.0, -7.0, 1.0, -1.0],  # question
    [-1.0, -6.0, 0.0, 5.0],  # question
]
BY_ACTIVATIONS = [
    CoreOverlap(),
    CoreOverlap(activated_by="magnitude"),
    CoreOverlap(token_set="question"),
    TokenOverlap(),
    TokenOverlap(offset=-2, activated_by="magnitude"),
    TextOverlap(),
    TextOverlap(activated_by="sign", token_set="text"),
    TextOverlap(rarity=1.0, normalize="cosine"),
    TextOverlap(activated_by="size", rarity=0.5),
    TextOverlap(activated_by="value", normalize="cosine"),
    Norm(),
]


def scores(score, view):
    """The image tokens' scores of the first sample; everything else must be NaN."""
    result = score(view)
    assert result.isnan().equal(~view.image)
    return result[0][view.image[0]].tolist()


def scene():
    return make_view(["tiitt"], [SCENE])


def test_core_overlap_by_hand():
    # rho 0.5 votes: {0}, {2, 0, 1} (1 ties), {3}, {0}, {3}: f = [3, 1, 1, 2]; core {0, 3}
    # positives of the image tokens: {0, 1, 2} and {1, 3}
    assert scores(CoreOverlap(top_ratio=0.5, core_ratio=0.5), scene()) == [1, 1]
    assert scores(CoreOverlap(top_ratio=0.5, core_ratio=0.75), scene()) == [2, 2]


def test_core_overlap_by_magnitude_by_hand():
    # the largest two by size: {0, 3}, {2 and the ties 0, 1, 3}, {1, 3}, {0, 1}, {1, 3}
    # f = [3, 4, 1, 4]; core {1, 3}
    assert scores(
        CoreOverlap(top_ratio=0.5, core_ratio=0.5, activated_by="magnitude"), scene()
    ) == [2, 2]


def test_token_overlap_by_hand():
    # positives: last {3}, before it {0, 2}, image {0, 1, 2} and {1, 3}
    assert scores(TokenOverlap(), scene()) == [0, 1]
    assert scores(TokenOverlap(offset=-2), scene()) == [2, 0]
    assert scores(TokenOverlap(offset=-50), scene()) == [2, 0]  # stops at the first token, {0, 2}


def test_token_overlap_finds_its_token_behind_padding():
    view = pad_left(scene(), 3, filler=7.0)
    assert scores(TokenOverlap(offset=-2), view) == [2, 0]
    assert scores(TokenOverlap(offset=-50), view) == [2, 0]


def test_text_overlap_by_hand():
    # the largest two by size: question {0, 1} and {1, 3}, so q = [1, 2, 0, 1];
    # image {0, 1, 2, 3} (ties) and {1, 3}
    assert scores(TextOverlap(top_ratio=0.5, rarity=0), scene()) == [4, 3]
    # the first text token adds {0, 3}
    assert scores(TextOverlap(top_ratio=0.5, token_set="text", rarity=0), scene()) == [6, 4]
    # by sign q = [1, 0, 1, 1]; image {0, 1, 2} and {1, 3}
    assert scores(TextOverlap(activated_by="sign", rarity=0), scene()) == [2, 1]


def test_text_overlap_normalized_by_hand():
    cosine = scores(TextOverlap(top_ratio=0.5, rarity=0, normalize="cosine"), scene())
    assert cosine == pytest.approx([4 / 2, 3 / math.sqrt(2)])


def test_text_overlap_with_rarity_by_hand():
    # users over the two image tokens: [1, 2, 1, 2]; idf = log(3 / (0.5 + users))
    idf = [math.log(3 / 1.5), math.log(3 / 2.5)]
    expected = [idf[0] + 2 * idf[1] + idf[1], 2 * idf[1] + idf[1]]
    assert scores(TextOverlap(top_ratio=0.5, rarity=1.0), scene()) == pytest.approx(expected)


def test_text_overlap_by_value_is_a_sum_of_cosines():
    view = make_view(["it"], [[[3.0, -4.0], [-4.0, 3.0]]])
    assert scores(TextOverlap(activated_by="value", rarity=0), view) == pytest.approx([-24 / 25])
    assert scores(TextOverlap(activated_by="size", rarity=0), view) == pytest.approx([24 / 25])


def test_question_is_the_text_after_the_last_image_token():
    view = make_view([".titit", "..tttt", "..ttii"])
    assert select_question(view).int().tolist() == [
        [0, 0, 0, 0, 0, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 0],
    ]


def test_norm_by_hand():
    assert scores(Norm(), make_view(["it"], [[[3.0, -4.0], [1.0, 1.0]]])) == [5]


def test_attention_is_the_mean_over_heads_of_the_last_row():
    asked = []

    def attention(rows):
        asked.append(rows.tolist())
        return torch.tensor([[[[0.1, 0.2, 0.7]], [[0.3, 0.6, 0.1]]]])

    view = make_view(["iit"], attention=attention)
    assert scores(Attention(), view) == pytest.approx([0.2, 0.4])
    assert asked == [[[2]]]


def test_projection_by_hand():
    # o = (3, 4), ||o|| = 5; <c_0, o> = 3, <c_1, o> = 8 - 3
    terms = torch.tensor([[[1.0, 0.0], [-1.0, 2.0], [3.0, 2.0], [50.0, 50.0]]])
    view = make_view(["iit."], contributions=lambda: terms)
    assert scores(ProjectionScore(), view) == pytest.approx([3 / 5, 5 / 5])


def test_projection_of_a_zero_output_is_zero():
    view = make_view(["it"], contributions=lambda: torch.zeros(1, 2, 4))
    assert scores(ProjectionScore(), view) == [0]


def test_random_depends_on_seed_layer_and_sample():
    embeddings = torch.randn(2, 5, 8)
    one = make_view(["tiit"], embeddings=embeddings[:1, 1:])
    both = make_view([".tiit", "tiiit"], embeddings=embeddings)
    assert scores(RandomTokens(), one) == scores(RandomTokens(), both)[:2]
    assert scores(RandomTokens(seed=1), one) != scores(RandomTokens(), one)
    later = make_view(["tiit"], embeddings=embeddings[:1, 1:], layer=9)
    assert scores(RandomTokens(), later) != scores(RandomTokens(), one)
    other = make_view(["tiit"], embeddings=embeddings[1:, 1:])
    assert scores(RandomTokens(), other) != scores(RandomTokens(), one)


def test_random_needs_no_exact_embeddings():
    embeddings = torch.randn(1, 6, 32)
    view, noisy = (
        make_view(["tiiiit"], embeddings=embeddings + noise)
        for noise in (0, 1e-5 * torch.rand(6, 32))
    )
    assert scores(RandomTokens(), view) == scores(RandomTokens(), noisy)


@pytest.mark.parametrize("score", BY_ACTIVATIONS, ids=repr)
@given(seed=st.integers(0, 50), pad=st.integers(1, 4))
def test_padding_and_company_change_nothing(score, seed, pad):
    a = torch.randn(1, 9, 20, generator=torch.Generator().manual_seed(seed))
    single = make_view(["ttiiiittt"], a)
    padded = pad_left(single, pad, filler=float("nan"))
    other = torch.randn(1, 9 + pad, 20, generator=torch.Generator().manual_seed(seed + 100))
    both = make_view(
        ["." * pad + "ttiiiittt", "i" * pad + "iitttiiit"],
        torch.cat([padded.activations, other]),
    )
    expected = score(single)[0][2:6]
    torch.testing.assert_close(score(padded)[0][2 + pad : 6 + pad], expected)
    torch.testing.assert_close(score(both)[0][2 + pad : 6 + pad], expected)


@pytest.mark.parametrize("score", BY_ACTIVATIONS, ids=repr)
@given(seed=st.integers(0, 50), random=st.randoms())
def test_scores_follow_a_permutation_of_the_image_tokens(score, seed, random):
    a = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(seed))
    order = list(range(2, 6))
    random.shuffle(order)
    order = [0, 1, *order, 6, 7]
    before = score(make_view(["ttiiiitt"], a))[:, order]
    after = score(make_view(["ttiiiitt"], a[:, order]))
    torch.testing.assert_close(after, before, equal_nan=True)


@pytest.mark.parametrize("score", BY_ACTIVATIONS, ids=repr)
def test_dead_activations_give_finite_scores(score):
    for a in (torch.zeros(1, 5, 6), -torch.ones(1, 5, 6)):
        view = make_view(["tiitt"], a)
        assert score(view)[view.image].isfinite().all()


@pytest.mark.parametrize("score", BY_ACTIVATIONS, ids=repr)
def test_half_precision_and_no_image(score):
    view = make_view(["tiitt", "ttttt"], torch.randn(2, 5, 16).bfloat16())
    result = score(view)
    assert result.dtype == torch.float32
    assert result[0, 1:3].isfinite().all() and result[1].isnan().all()


def test_needs():
    assert Attention().needs == {ATTENTION}
    assert ProjectionScore().needs == {CONTRIBUTIONS}
    assert RandomTokens().needs == {EMBEDDINGS}


@pytest.mark.parametrize("name", names("token score"))
def test_a_view_without_the_part_is_refused_by_name(name):
    score = score_by_name(name)
    if not score.needs:
        return
    with pytest.raises(ConfigError, match="layer -1 shows no"):
        score(make_view(["it"], layer=-1))


@pytest.mark.parametrize("name", names("token score"))
def test_round_trip(name):
    score = score_by_name(name)
    assert TokenScore.from_dict(score.to_dict()) == score


@pytest.mark.parametrize(
    "make",
    [
        lambda: CoreOverlap(top_ratio=0.0),
        lambda: CoreOverlap(core_ratio=1.01),
        lambda: CoreOverlap(activated_by="signs"),
        lambda: CoreOverlap(token_set="questoin"),
        lambda: TokenOverlap(offset=0),
        lambda: TokenOverlap(offset=-1.0),
        lambda: TextOverlap(top_ratio=2),
        lambda: TextOverlap(rarity=-1),
        lambda: TextOverlap(normalize="l2"),
        lambda: RandomTokens(seed=-1),
        lambda: RandomTokens(seed=0.5),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()
