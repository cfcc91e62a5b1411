"""Places of the tokens of a set."""

import torch

from corematching.policy.tokens import list_rows


def test_rows_by_hand():
    tokens = torch.tensor([[True, False, True, False], [False, True, False, False]])
    rows, present = list_rows(tokens)
    assert present.tolist() == [[True, True], [True, False]]
    assert rows[0].tolist() == [0, 2] and rows[1, 0] == 1


def test_no_tokens():
    rows, present = list_rows(torch.zeros(2, 3, dtype=torch.bool))
    assert rows.shape == present.shape == (2, 0)
    rows, present = list_rows(torch.zeros(0, 3, dtype=torch.bool))
    assert rows.shape == present.shape == (0, 0)
