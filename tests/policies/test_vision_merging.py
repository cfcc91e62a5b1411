"""VisionZip and PruMerge by hand."""

import math

import pytest
import torch

from corematching.errors import ConfigError
from corematching.policies.vision_merging import (
    attend_to_patches,
    count_outliers,
    join_heads,
    prune_and_merge,
    zip_tokens,
)


def test_zip_by_hand():
    features = torch.tensor([[[1.0], [10.0], [100.0], [1000.0], [5.0], [7.0]]])
    # summed over heads: .9, .2, .1, .8, .3, .3 -> dominant 0 and 3; others 1, 2, 4, 5
    attention = torch.tensor([[[0.4, 0.1, 0.1, 0.5, 0.1, 0.2], [0.5, 0.1, 0.0, 0.3, 0.2, 0.1]]])
    # head means of the keys: patch 2 like patch 1, patch 5 like patch 4
    keys = torch.zeros(1, 2, 6, 2)
    keys[0, 0] = torch.tensor([[0, 0], [2, 0], [3, 1], [0, 0], [0, 1], [1, 9]])
    # targets at stride 4 // 2 = 2 among the others: 1 and 4
    keep, merged = zip_tokens(features, attention, keys, dominant=2, contextual=2)
    assert keep.tolist() == [[True, True, False, True, True, False]]
    assert merged[0, :, 0].tolist() == [1, 10 + 100, 100, 1000, 5 + 7, 7]


def test_zip_adds_the_mean_of_several():
    features = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    attention = torch.tensor([[[9.0, 0.0, 0.0, 0.0]]])
    keep, merged = zip_tokens(features, attention, torch.ones(1, 1, 4, 3), 1, 1)
    assert keep.tolist() == [[True, True, False, False]]
    assert merged[0, 1].tolist() == [2 + (4 + 8) / 2]


def test_zip_target_to_which_nothing_comes_stays():
    features = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    keys = torch.tensor([[[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    attention = torch.tensor([[[9.0, 0.0, 0.0, 0.0]]])
    keep, merged = zip_tokens(features, attention, keys, 1, 2)
    assert keep.tolist() == [[True, True, True, False]]
    assert merged[0, :, 0].tolist() == [1, 2, 12, 8]


def test_zip_images_stand_alone():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 5, generator=rng)
    attention = torch.rand(3, 2, 20, generator=rng)
    keys = torch.randn(3, 2, 20, 4, generator=rng)
    keep, merged = zip_tokens(features, attention, keys, 6, 4)
    assert keep.sum(1).tolist() == [10, 10, 10]
    for image in range(3):
        one = slice(image, image + 1)
        alone = zip_tokens(features[one], attention[one], keys[one], 6, 4)
        assert alone[0].equal(keep[one])
        torch.testing.assert_close(alone[1], merged[one])


def test_zip_without_contextual_tokens_and_with_all():
    features, attention = torch.randn(1, 4, 2), torch.rand(1, 1, 4)
    keep, merged = zip_tokens(features, attention, torch.randn(1, 1, 4, 2), 3, 0)
    assert keep.sum() == 3 and merged.equal(features)
    keep, merged = zip_tokens(features, attention, torch.randn(1, 1, 4, 2), 2, 2)
    assert keep.all()
    torch.testing.assert_close(merged, features)


@pytest.mark.parametrize(("dominant", "contextual"), [(0, 1), (4, 1), (1, -1)])
def test_zip_refuses_what_does_not_fit(dominant, contextual):
    with pytest.raises(ConfigError, match="of 4 image tokens"):
        zip_tokens(
            torch.zeros(1, 4, 1),
            torch.zeros(1, 1, 4),
            torch.zeros(1, 1, 4, 1),
            dominant,
            contextual,
        )


def test_outliers_by_hand():
    # quartiles of 0..7 and 100: 2 and 6, so above 6 + 1.5 * 4 = 12
    attention = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7, 100], [0.0, 1, 2, 3, 4, 5, 6, 7, 12]])
    assert count_outliers(attention).tolist() == [1, 1]  # none in the second: at least one


def test_prune_and_merge_by_hand():
    # token 3 is the one outlier; its two nearest keys are those of 1 and 4
    attention = torch.tensor([[0.1, 0.2, 0.1, 0.9, 0.3]])
    features = torch.tensor([[[1.0], [10.0], [100.0], [1000.0], [2.0]]])
    keys = torch.tensor([[[-1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [3.0, -1.0]]])
    assert count_outliers(attention).tolist() == [1]
    keep, merged = prune_and_merge(features, attention, keys, torch.tensor([1]), neighbours=2)
    assert keep.tolist() == [[False, False, False, True, False]]
    assert merged[0, :, 0].tolist() == pytest.approx([1, 10, 100, 1000 + 0.2 * 10 + 0.3 * 2, 2])


def test_prune_and_merge_adds_kept_neighbours_as_they_were():
    # two outliers that are each other's nearest
    attention = torch.tensor([[0.0] * 6 + [0.5, 0.4]])
    features = torch.arange(8.0).view(1, 8, 1)
    keys = torch.cat([torch.eye(8)[:6], torch.eye(8)[6:7], torch.eye(8)[6:7]])[None]
    keep, merged = prune_and_merge(features, attention, keys, torch.tensor([2]), neighbours=1)
    assert keep[0].nonzero().squeeze(1).tolist() == [6, 7]
    assert merged[0, 6:, 0].tolist() == pytest.approx([6 + 0.4 * 7, 7 + 0.5 * 6])


def test_prune_and_merge_keeps_what_each_image_is_given():
    features, keys = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    keep, _ = prune_and_merge(features, torch.rand(2, 6), keys, torch.tensor([1, 6]))
    assert keep.sum(1).tolist() == [1, 6]


def test_class_attention_by_hand():
    queries = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]] * 3]])
    queries[:, :, 1:] = 100.0  # the patches' own rows do not count
    keys = torch.tensor([[[[0.0, 1, 0, 0], [1.0, 0, 0, 0], [3.0, 0, 5, 0]]]])
    total = 1 + math.e + math.e**3
    got = attend_to_patches(queries, keys, scaling=0.5, classes=1)
    assert got.shape == (1, 1, 2)
    assert got[0, 0].tolist() == pytest.approx([math.e / total, math.e**3 / total])


def test_attention_without_a_class_token_is_the_mean_over_the_patches():
    queries = torch.tensor([[[[0.0], [1.0]]]])
    keys = torch.tensor([[[[0.0], [2.0]]]])
    got = attend_to_patches(queries, keys, scaling=1.0, classes=0)
    second = 1 / (1 + math.exp(-2))
    assert got[0, 0].tolist() == pytest.approx([(0.5 + 1 - second) / 2, (0.5 + second) / 2])


def test_joined_heads_give_one_softmax_over_the_whole_width():
    heads = torch.arange(12.0).view(1, 2, 3, 2)
    assert join_heads(heads)[0, 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
