"""What kept tokens count for, against hand-computed cases and what must always hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corematching.errors import ConfigError
from corematching.methods import CoreMatching, TokenRule
from corematching.methods.staged import StagedRule
from corematching.policies import Ratio, proportional
from corematching.policies.proportional import count_alike
from corematching.policies.token_scores.stride import StrideScore

from .views import make_view

# text, then directions 0, 10, 80, 90 and 100 degrees, then text
ANGLES = torch.tensor([45.0, 0, 10, 80, 90, 100, 45]).deg2rad()
FEATURES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)[None] * torch.arange(1, 8)[:, None]
IMAGE = torch.tensor([[False, True, True, True, True, True, False]])


def kept(*positions):
    keep = torch.zeros(1, 7, dtype=torch.bool)
    keep[0, list(positions)] = True
    return keep


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(proportional, "CHUNK", chunk)
    # 10 is like 0; 80 and 100 are like 90
    weights = count_alike(FEATURES, IMAGE, kept(1, 4), None)
    assert weights[0, [1, 4]].tolist() == [2, 3]
    assert weights[0, [0, 6]].tolist() == [1, 1], "text counts for itself"


def test_earlier_weights_are_handed_on():
    before = torch.tensor([[1.0, 2, 3, 4, 5, 6, 1]])
    weights = count_alike(FEATURES, IMAGE, kept(1, 4), before)
    assert weights[0, [0, 1, 4, 6]].tolist() == [1, 5, 15, 1]


def test_of_equals_the_first():
    same = torch.ones(1, 7, 2)
    assert count_alike(same, IMAGE, kept(2, 4), None)[0, [2, 4]].tolist() == [4, 1]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 12))
def test_nothing_is_lost(seed, batch, length):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, length, 3, generator=rng)
    image = torch.rand(batch, length, generator=rng) < 0.7
    keep = image & (torch.rand(batch, length, generator=rng) < 0.5)
    keep |= image & (image.cumsum(1) == 1)  # at least one
    before = 1 + torch.rand(batch, length, generator=rng)
    after = count_alike(features.to(torch.bfloat16), image, keep, before)
    present = keep | ~image
    torch.testing.assert_close((after * present).sum(1), before.sum(1))
    assert bool((after >= before).all())
    assert torch.equal(after[~image], before[~image])


def test_rules_weigh_only_if_told():
    view = make_view(["tiiiiit"], hidden=FEATURES)
    rule = TokenRule(StrideScore(0.4), Ratio(0.4), (0,))
    assert not rule.proportional and rule.choose(view).weights is None
    rule = TokenRule(StrideScore(0.4), Ratio(0.4), (0,), proportional=True)
    choice = rule.choose(view)
    assert rule.proportional and choice.weights is not None
    assert float((choice.weights * choice.keep).sum()) == 7


def test_the_published_rule_does_not_weigh():
    assert CoreMatching().tokens.proportional and not CoreMatching.paper().tokens.proportional
    staged = CoreMatching(layer=(0.3, 0.6), keep_ratio=(0.5, 0.2)).tokens
    assert isinstance(staged, StagedRule) and staged.proportional
    with pytest.raises(ConfigError, match="proportional"):
        CoreMatching(proportional=1)
