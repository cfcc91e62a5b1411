"""What the host knows of the tokens behind a cut, against the masks themselves."""

import numpy as np
import pytest
import torch

from corematching import devices
from corematching.cache.masks import survivors
from corematching.runtime.prefill.known import KnownTokens

PROMPTS = {
    "one picture": [[0, 0, 1, 1, 1, 1, 0]],
    "padding": [[-1, -1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]],
    "a sample without images": [[-1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0]],
    "text between pictures": [[0, 1, 1, 0, 1, 1, 0]],
}


def know(prompt, monkeypatch):
    monkeypatch.setattr(devices, "on_host", lambda x: False)
    kinds = torch.tensor(prompt)
    valid, image = kinds >= 0, kinds == 1
    known = KnownTokens(valid, image)
    known.read()
    return known, valid, image


@pytest.mark.parametrize("name", PROMPTS)
def test_the_masks_follow_from_the_counts(name, monkeypatch):
    known, valid, image = know(PROMPTS[name], monkeypatch)
    assert known.view.image_counts == tuple(image.sum(1).tolist())
    assert known.is_full == bool(valid.all())
    keep = image.clone()
    for row in keep:
        row[row.nonzero().flatten()[1::2]] = False
    counts = keep.sum(1).tolist()
    order, present = survivors((keep | ~image) & valid)
    assert known.cut(counts) == order.shape[1]
    assert known.is_full == bool(present.all())
    if name == "text between pictures":
        assert known.view.image is None  # which tokens stay says where the text is
        return
    assert np.array_equal(known.view.valid, present)
    assert np.array_equal(known.view.image, image.gather(1, order) & present)


def test_a_cut_that_drops_nothing_or_all_keeps_the_masks_of_any_prompt(monkeypatch):
    for counts, expected in (([4], [0, 1, 1, 0, 1, 1, 0]), ([0], [0, 0, 0])):
        known, *_ = know(PROMPTS["text between pictures"], monkeypatch)
        known.cut(counts)
        assert known.view.image.astype(int).tolist() == [expected]


def test_nothing_is_copied_on_the_cpu():
    known = KnownTokens(torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
    known.read()
    assert known.view is None and known.is_full is None
