"""Core neurons of a sentence, compensation and whole numbers."""

import pytest
import torch

from corematching.errors import ConfigError
from corematching.policies.amounts import count_of, counts_of, layers_of
from corematching.policies.compensation import average_dropped
from corematching.policies.core import count_activations, pick_core_neurons, pick_top
from corematching.policies.passes import sum_tokens
from corematching.policies.shuffle import hash_uniform


def test_counts_leave_other_tokens_out():
    activated = torch.tensor([[[1, 1, 0], [1, 0, 0], [1, 1, 1]]]).bool()
    tokens = torch.tensor([[True, True, False]])
    assert count_activations(activated, tokens).tolist() == [[2, 1, 0]]


def test_ties_go_to_the_lower_index():
    assert pick_top(torch.tensor([[1, 3, 3, 3, 0], [2, 2, 2, 2, 2]]), 2).tolist() == [
        [1, 2],
        [0, 1],
    ]


def test_core_neurons_by_hand():
    # rho = 0.5: of P positives the first floor((P - 1) / 2) + 1
    a = torch.tensor(
        [
            [
                [4.0, 3.0, 2.0, -9.0, -1.0],  # 3 positives: neurons 0, 1
                [-1.0, 5.0, -1.0, 1.0, -1.0],  # 2 positives: neuron 1
                [2.0, -1.0, -1.0, 9.0, 8.0],  # 3 positives: neurons 3, 4
                [9.0, 9.0, 9.0, 9.0, 9.0],  # padding
            ]
        ]
    )
    tokens = torch.tensor([[True, True, True, False]])  # f = [1, 2, 0, 1, 1]
    assert pick_core_neurons(a, tokens, rho=0.5, beta=0.4).tolist() == [[0, 1]]
    assert pick_core_neurons(a, tokens, rho=0.5, beta=0.6).tolist() == [[0, 1, 3]]


def test_core_neurons_by_magnitude_see_the_negative_ones():
    a = torch.tensor([[[1.0, -9.0, 2.0, 0.0], [0.5, -4.0, 0.1, 0.2]]])
    tokens = torch.ones(1, 2, dtype=torch.bool)
    assert pick_core_neurons(a, tokens, 0.25, 0.25, "magnitude").tolist() == [[1]]
    assert pick_core_neurons(a, tokens, 0.25, 0.25, "sign").tolist() == [[0]]


def test_no_positive_activation_anywhere_still_gives_neurons():
    a = -torch.ones(1, 3, 10)
    assert pick_core_neurons(a, torch.ones(1, 3).bool(), 0.2, 0.3).tolist() == [[0, 1, 2]]


def test_average_of_the_dropped_by_hand():
    a = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [float("nan"), 0.0, 7.0]]])
    tokens = torch.tensor([[True, True, False]])
    mean = average_dropped(sum_tokens(a, tokens), tokens, torch.tensor([[1]]))
    assert mean.tolist() == [[2.0, 0.0, 4.0]]


def test_average_of_half_precision_is_taken_in_float32():
    a = torch.full((1, 5000, 2), 1.0, dtype=torch.bfloat16)
    tokens = torch.ones(1, 5000).bool()
    mean = average_dropped(sum_tokens(a, tokens), tokens, torch.tensor([[0]]))
    assert mean.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [(0.2, 10, 2), (0.25, 10, 3), (0.24, 10, 2), (0.001, 10, 1), (1.0, 7, 7), (0.29, 100, 29)],
)
def test_shares_round_half_up_and_leave_one(share, total, expected):
    assert count_of(share, total) == expected
    assert counts_of(share, torch.tensor([total, 0])).tolist() == [expected, 0]


def test_shares_of_the_depth():
    assert [layers_of(6 / 32, depth) for depth in (32, 30, 40, 2)] == [6, 6, 8, 0]
    assert layers_of(3, 4) == 3
    with pytest.raises(ConfigError, match="the model has 4"):
        layers_of(5, 4)


def test_hash_is_uniform_and_depends_on_each_key():
    places = torch.arange(4096)
    numbers = hash_uniform(0, 3, places)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.var() - 1 / 12) < 0.01
    assert numbers.unique().numel() > 4090
    assert not torch.equal(numbers, hash_uniform(1, 3, places))
    assert not torch.equal(numbers, hash_uniform(0, 4, places))
    following = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
    assert abs(following) < 0.05
