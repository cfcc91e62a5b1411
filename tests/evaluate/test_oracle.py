"""Patches under known boxes."""

from __future__ import annotations

import pytest
import torch

from corematching.errors import ConfigError
from corematching.evaluate.oracle import BoxCoverage, Oracle, rank_patches
from corematching.methods import method_from_dict
from corematching.protocol import PrefillView


def view_of(images: list[list[bool]]) -> PrefillView:
    image = torch.tensor(images)
    return PrefillView(layer=1, num_layers=4, valid=torch.ones_like(image), image=image)


def covered(areas, side=4):
    return (rank_patches(areas, side) > 0).view(side, side)


def test_a_box_covers_its_patches():
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, :2] = True
    assert torch.equal(covered([(0.0, 0.5, 0.5, 1.0)]), expected)


def test_a_sliver_is_not_covered():
    assert covered([(0.0, 0.0, 0.25 + 0.05, 0.25)]).sum() == 1


def test_a_tiny_box_covers_the_patch_it_fills_most():
    found = covered([(0.6, 0.6, 0.65, 0.65)])
    assert found.sum() == 1 and found[2, 2]


def test_every_object_gives_the_same_ratio():
    areas = [(0, 0, 0.5, 0.5), (0.75, 0.75, 1, 1)]
    scores = rank_patches(areas, 8).view(8, 8)
    top = scores > 0.74
    assert top[:4, :4].sum() == 5 and top[6:, 6:].sum() == 2 and top.sum() == 7


def test_inner_patches_come_first():
    scores = rank_patches([(0, 0, 1, 1)], 3).view(3, 3)
    assert scores.argmax() == 4 and scores.min() > 0


def test_background_falls_with_the_distance():
    scores = rank_patches([(0, 0, 0.25, 0.25)], 4).view(4, 4)
    assert scores[0, 0] == 1
    assert 0 > scores[0, 1] > scores[0, 2] > scores[0, 3] > scores[3, 3]


def test_scores_stand_on_the_image_tokens():
    score = BoxCoverage()
    score.show([[(0, 0, 0.5, 0.5)], [(0.5, 0.5, 1, 1)]])
    scores = score(view_of([[False, True, True, True, True, False]] * 2))
    assert scores.isnan()[:, [0, 5]].all()
    assert scores[0].nan_to_num(-9).argmax() == 1 and scores[1].nan_to_num(-9).argmax() == 4


def test_all_that_is_covered_is_kept():
    method = Oracle()
    method.tokens.score.show([[(0, 0, 0.5, 1)], [(0, 0, 0.5, 0.5)]])
    choice = method.tokens.choose(view_of([[True] * 4 + [False]] * 2))
    assert choice.keep.tolist() == [[True, False, True, False, True], [True] + [False] * 3 + [True]]


@pytest.mark.parametrize(("amount", "count"), [({"keep_ratio": 0.5}, 2), ({"keep_tokens": 3}, 3)])
def test_budgets(amount, count):
    method = Oracle(**amount)
    method.tokens.score.show([[(0, 0, 0.5, 0.5)]])
    assert method.tokens.choose(view_of([[True] * 4])).keep.sum() == count


def test_a_scene_without_boxes_keeps_one():
    method = Oracle()
    method.tokens.score.show([[]])
    assert method.tokens.choose(view_of([[True] * 4])).keep.sum() == 1


def test_neurons_are_dense_unless_asked():
    assert Oracle().neurons is None and Oracle(neuron_ratio=0.5).neurons.among.ratio == 0.5


def test_round_trip():
    assert method_from_dict(Oracle(keep_ratio=0.2).to_dict()) == Oracle(keep_ratio=0.2)


def test_wrong_number_of_scenes():
    with pytest.raises(ConfigError, match="knows 0 scenes, the batch has 1: run it with"):
        BoxCoverage()(view_of([[True] * 4]))


def test_no_square():
    score = BoxCoverage()
    score.show([[]])
    with pytest.raises(ConfigError, match="5 image tokens, which form no square"):
        score(view_of([[True] * 5]))


def test_several_layers_are_refused():
    with pytest.raises(ConfigError, match="give one layer"):
        Oracle(layer=(1, 2))
