"""Places of the tokens of a set."""

import torch

from corematching.policies.tokens import count_most, list_chosen, list_rows
from corematching.protocol import PrefillView


def test_rows_by_hand():
    tokens = torch.tensor([[True, False, True, False], [False, True, False, False]])
    rows, present = list_rows(tokens, count_most(tokens))
    assert present.tolist() == [[True, True], [True, False]]
    assert rows[0].tolist() == [0, 2] and rows[1, 0] == 1


def test_no_tokens():
    assert count_most(torch.zeros(2, 3, dtype=torch.bool)) == 0
    rows, present = list_rows(torch.zeros(2, 3, dtype=torch.bool), 0)
    assert rows.shape == present.shape == (2, 0)
    assert count_most(torch.zeros(0, 3, dtype=torch.bool)) == 0
    rows, present = list_rows(torch.zeros(0, 3, dtype=torch.bool), 0)
    assert rows.shape == present.shape == (0, 0)


def test_a_set_is_counted_once_per_length():
    valid = torch.tensor([[True, True, True], [False, True, True]])
    image = torch.tensor([[True, True, False], [False, False, True]])
    view = PrefillView(0, 4, valid, image)
    rows, present = list_chosen(view, "image")
    assert present.sum(1).tolist() == [2, 1] and rows[0].tolist() == [0, 1]
    later = PrefillView(1, 4, valid[:, 1:], image[:, 1:], memory=view.memory)
    rows, present = list_chosen(later, "image")
    assert rows[:, 0].tolist() == [0, 1] and present.all()
