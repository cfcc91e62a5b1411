"""Gates of text tokens are kept by the product that computes them, and found by who asked."""

from __future__ import annotations

import pytest
import torch

from corematching import CoreMatching
from corematching.backends.cpu.native import find_kernels, prefers_native
from corematching.methods import gate_threshold
from corematching.model.gate_store import GateStore, make_gate_request
from tests import models
from tests.runtime.families import generate

TEXT = torch.tensor([[True, False, True, True], [False, False, True, True]])


def test_a_wish_lists_the_tokens_and_their_places():
    request = make_gate_request(TEXT)
    assert request.rows.tolist() == [[0, 2, 3], [2, 3, 0]]  # the last one fills up
    assert request.slots.tolist() == [0, -1, 1, 2, 5, -1, 3, 4]
    none = make_gate_request(torch.zeros(2, 4, dtype=torch.bool))
    assert none.rows.shape == (2, 0) and none.slots.eq(-1).all()


def test_only_who_asked_finds_what_was_kept():
    gates, mlp, request, x = GateStore(), object(), make_gate_request(TEXT), torch.randn(2, 4, 3)
    assert gates.make_room(mlp, x, 5) is None and gates.find(mlp, x, request.rows) is None
    gates.ask(mlp, request)
    assert gates.find(mlp, x, request.rows) is None  # nothing has run yet
    assert gates.make_room(object(), x, 5) is None
    assert gates.make_room(mlp, x[:, :2], 5) is None
    places, kept = gates.make_room(mlp, x, 5)
    assert places is request.slots and kept.shape == (2, 3, 5)
    assert gates.find(mlp, x, request.rows.clone()) is kept
    assert gates.find(mlp, x, request.rows[:, :2]) is None
    assert gates.find(mlp, x.clone(), request.rows) is None
    assert gates.find(object(), x, request.rows) is None
    rows = request.rows.clone()
    assert request.lists(rows) and request.lists(rows) and not request.lists(rows + 1)
    gates.forget()
    assert gates.make_room(mlp, x, 5) is None and gates.find(mlp, x, request.rows) is None


@pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thresholds_are_those_of_a_gate_computed_anew(dtype, monkeypatch):
    """Also behind the cut, where fewer tokens are left, and in padded batches."""
    model = models.build("llava").to(dtype)
    inputs = models.make_inputs("llava", model, batch=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    seen, own = [], gate_threshold.find_cut
    monkeypatch.setattr(
        gate_threshold, "find_cut", lambda *args: seen.append(own(*args)) or seen[-1]
    )
    kept, find = [], GateStore.find

    def count(self, *args):
        kept.append(find(self, *args))
        return kept[-1]

    for patched in (count, lambda *_: None):
        monkeypatch.setattr(GateStore, "find", patched)
        with CoreMatching(keep=0.3, layer=1)(model), torch.no_grad():
            model(**inputs)
    layers = len(models.build("llava").model.language_model.layers)
    assert len(kept) == layers and len(seen) == 2 * layers
    if prefers_native(dtype) and dtype == torch.bfloat16:
        assert all(gate is not None for gate in kept)
    for ours, theirs in zip(seen[:layers], seen[layers:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-6)


class Renamed(torch.nn.Module):
    """An FFN whose activation function goes by another name; ``act_fn`` is no function."""

    def __init__(self, mlp, name):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.name = "silu", name
        setattr(self, name, mlp.act_fn)

    def forward(self, x):
        return self.down_proj(getattr(self, self.name)(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("name", ["activation", "activation_fn", "act", "act_fn"])
def test_an_activation_of_any_known_name_gives_the_gate(name, engine):
    logits = []
    for renamed in (False, True):
        model = models.build("llava")
        for layer in model.get_decoder().layers if renamed else ():
            layer.mlp = Renamed(layer.mlp, name)
        with torch.no_grad(), CoreMatching()(model, engine=engine):
            logits.append(generate(model, models.make_inputs("llava", model)).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
