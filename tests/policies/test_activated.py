"""Which neurons a token activates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from corematching.policies.activated import (
    activate_by_magnitude,
    activate_by_sign,
    activate_shared_top_positive,
    activate_top_positive,
    find_kth_largest,
)

tokens_of = st.integers(1, 4).flatmap(
    lambda tokens: st.integers(1, 24).flatmap(
        lambda width: arrays(np.float32, (1, tokens, width), elements=st.integers(-5, 5).map(float))
    )
)
shares = st.integers(1, 100).map(lambda percent: percent / 100)


def on(mask: torch.Tensor) -> list[list[int]]:
    """The indices that are True, token by token of the first sample."""
    return [row.nonzero().flatten().tolist() for row in mask[0]]


def test_sign_takes_strictly_positive_entries():
    assert on(activate_by_sign(torch.tensor([[[-1.0, 0.0, 2.0], [3.0, -0.0, -2.0]]]))) == [[2], [0]]


def test_magnitude_takes_the_top_share_by_absolute_value():
    a = torch.tensor([[[1.0, -5.0, 2.0, 0.5, -3.0], [0.1, 0.2, 0.3, 0.4, -0.5]]])
    assert on(activate_by_magnitude(a, 0.4)) == [[1, 4], [3, 4]]


def test_magnitude_lets_ties_in_and_zeros_out():
    a = torch.tensor([[[2.0, -2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert on(activate_by_magnitude(a, 0.5)) == [[0, 1, 3], [2], []]


def test_top_positive_takes_what_stands_at_or_above_the_percentile():
    positives = torch.arange(1.0, 12.0)  # of 11, the first floor(10 * 0.2) + 1 = 3
    a = torch.cat([positives, -positives])[None, None]
    assert on(activate_top_positive(a, 0.2)) == [[8, 9, 10]]


def test_top_positive_counts_each_tokens_own_positives():
    a = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0], [-1.0, -2.0, 7.0, -3.0, -4.0], [-1.0] * 5]])
    assert on(activate_top_positive(a, 0.5)) == [[0, 1, 2], [2], []]


def test_shared_top_positive_has_one_k_from_the_mean_of_the_valid_tokens():
    a = torch.tensor(
        [[[9.0] * 8, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0] + [-1.0] * 6]]
    )
    valid = torch.tensor([[False, True, True]])  # mean (8 + 2) / 2 = 5, k = floor(0.4 * 5) = 2
    assert on(activate_shared_top_positive(a, 0.4, valid))[1:] == [[0, 1], [0, 1]]
    everyone = torch.tensor([[True, True, True]])  # mean 6, k = 2; the flat token ties throughout
    assert on(activate_shared_top_positive(a, 0.4, everyone))[0] == list(range(8))


def test_shared_top_positive_takes_what_there_is():
    a = torch.tensor([[[3.0, 2.0, 1.0, 4.0], [-1.0, -1.0, 5.0, -1.0]]])
    assert on(activate_shared_top_positive(a, 1.0, torch.ones(1, 2, dtype=torch.bool))) == [
        [0, 3],
        [2],
    ]


@given(tokens_of, shares)
def test_top_positive_is_numpys_percentile(a, rho):
    mask = activate_top_positive(torch.from_numpy(a), rho)
    for token, chosen in zip(a[0], mask[0].numpy(), strict=True):
        positives = token[token > 0].astype(np.float64)
        if not positives.size:
            assert not chosen.any()
            continue
        threshold = np.percentile(positives, 100 - 100 * rho)
        expected = (token > 0) & (token >= threshold - 1e-9)
        assert (chosen == expected).all()


@given(tokens_of, shares)
def test_magnitude_takes_at_least_its_share_of_the_nonzero(a, share):
    mask = activate_by_magnitude(torch.from_numpy(a), share).numpy()
    size = np.abs(a)
    count = max(1, int(np.floor(share * a.shape[-1] + 0.5 + 1e-9)))
    assert (mask.sum(-1) >= np.minimum(count, (size > 0).sum(-1))).all()
    lowest_in = np.where(mask, size, np.inf).min(-1)
    highest_out = np.where(mask, -np.inf, size).max(-1)
    assert (highest_out < lowest_in).all()


@given(tokens_of, shares, st.randoms())
def test_rules_follow_a_permutation_of_the_neurons(a, share, random):
    order = list(range(a.shape[-1]))
    random.shuffle(order)
    a = torch.from_numpy(a)
    for rule in (activate_top_positive, activate_by_magnitude):
        assert torch.equal(rule(a, share)[..., order], rule(a[..., order], share))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_result_of_its_own_values(dtype):
    a = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    valid = torch.ones(2, 7, dtype=torch.bool)
    for rule in (
        activate_by_sign,
        lambda x: activate_by_magnitude(x, 0.2),
        lambda x: activate_top_positive(x, 0.2),
        lambda x: activate_shared_top_positive(x, 0.2, valid),
    ):
        assert torch.equal(rule(a), rule(a.float()))


def test_kth_largest_agrees_with_torch():
    values = torch.randn(3, 5, 31, generator=torch.Generator().manual_seed(1))
    for k in (1, 7, 31):
        expected = values.kthvalue(31 - k + 1, dim=-1, keepdim=True).values
        assert torch.equal(find_kth_largest(values, k), expected)
