"""Code that reads weights itself takes only layers that compute with these very weights."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize

from corematching.errors import UnsupportedModelError
from corematching.methods import CoreMatching
from corematching.model.linear import is_linear, is_plain_linear
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, TestMethod, assert_same, generate

NEURONS = TestMethod(None, RandomNeurons((1,)))
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


class Rounded(nn.Module):
    """A weight in 16 steps, as a parametrization."""

    def forward(self, weight):
        step = weight.abs().amax() / 7
        return (weight / step).round() * step


class Subclass(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, Rounded()(self.weight), self.bias)


def round_in_forward(linear):
    """What quantisation libraries do: a forward on the instance that rounds the weight."""

    @functools.wraps(type(linear).forward)
    def forward(self, x):
        return nn.functional.linear(x, Rounded()(self.weight), self.bias)

    linear.forward = forward.__get__(linear)
    return linear


def hook(linear):
    return add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Rounded())
    return linear


def subclassed(linear):
    new = Subclass(linear.in_features, linear.out_features, linear.bias is not None)
    new.load_state_dict(linear.state_dict())
    return new


ODD = {
    "forward": round_in_forward,
    "forward under a hook of accelerate": lambda linear: hook(round_in_forward(linear)),
    "parametrization": parametrized,
    "subclass": subclassed,
}


def replace(model, path, make):
    for layer in model.get_decoder().layers[2:]:
        owner, _, name = path.rpartition(".")
        owner = layer.get_submodule(owner)
        setattr(owner, name, make(getattr(owner, name)))


@pytest.mark.parametrize("kind", ODD)
def test_other_linears_are_not_plain(kind):
    assert not is_plain_linear(ODD[kind](nn.Linear(4, 4)))
    assert not is_plain_linear(nn.Conv1d(4, 4, 1)) and not is_plain_linear(None)


def test_plain_linears():
    linear = nn.Linear(4, 4)
    assert is_plain_linear(linear) and is_linear(linear)
    assert is_plain_linear(hook(linear))
    adapter = nn.Module()
    adapter.in_features, adapter.base_layer = 4, linear
    assert not is_linear(adapter) and not is_linear(nn.Identity())


@pytest.mark.parametrize("path", LINEARS)
@pytest.mark.parametrize("kind", ODD)
def test_all_neurons_equal_dense(kind, path):
    model = build("llama")
    replace(model, path, ODD[kind])
    inputs = make_inputs("llama", model, batch=2, text_lengths=[70, 80])
    dense = generate(model, inputs)
    with CoreMatching(score=None, neurons=None)(model) as run:
        assert_same(generate(model, inputs), dense, tolerance=1e-4)
        assert run.report.path.native_steps == 0
    assert_same(generate(model, inputs), dense, tolerance=0)


@pytest.mark.parametrize("path", ["mlp.up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("kind", ODD)
def test_neurons_of_other_linears_are_refused(kind, path):
    model = build("llava")
    replace(model, path, ODD[kind])
    with pytest.raises(UnsupportedModelError, match=r"LlamaMLP's .*CoreMatching\(neurons=None\)"):
        attach(model, NEURONS)
    inputs = make_inputs("llava", model)
    with CoreMatching(neurons=None)(model) as run:  # what the message says
        generate(model, inputs)
        assert 0 < run.report.samples[0].kept_tokens < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_difference_of_a_late_layer_is_found(dtype):
    """A layer of Llama's form that computes two percent more."""
    model = build("llama", num_hidden_layers=8).to(dtype)
    assert _steps(model).reason == ""

    class Louder(type(model.get_decoder().layers[0])):
        def forward(self, *args, **kwargs):
            return 1.02 * super().forward(*args, **kwargs)

    model.get_decoder().layers[5].__class__ = Louder
    assert "a probe gave other numbers" in _steps(model).reason


def test_a_decoder_that_cannot_be_probed_decodes_in_pytorch():
    model = build("llama")

    class Strict(type(model.get_decoder())):
        def forward(self, **kwargs):
            if kwargs["position_ids"].max() > 500:
                raise ValueError("too far")
            return super().forward(**kwargs)

    model.get_decoder().__class__ = Strict
    assert "a probe" in _steps(model).reason


def _steps(model):
    run = attach(model, NEURONS)
    steps = run._session.backend.steps
    detach(model)
    return steps
