"""A model with a method installed refuses to be copied: a copy would share the patches."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from corematching.errors import InputError
from corematching.runtime import attach, detach
from tests.models import build
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod

WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda module: torch.save(module, io.BytesIO()),
}


@pytest.fixture
def model():
    model = build("llava")
    attach(model, TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,), True)))
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["", "model.language_model", "model.language_model.layers.2.mlp"])
def test_a_copy_is_refused_while_a_method_is_installed(model, way, part):
    with pytest.raises(InputError, match="remove the method first"):
        WAYS[way](model.get_submodule(part))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_can_be_made_afterwards(model, way):
    detach(model)
    WAYS[way](model)


def test_weights_can_be_saved_meanwhile(model):
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    for name, tensor in torch.load(saved).items():
        assert torch.equal(tensor, model.state_dict()[name])
