from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers.utils import output_capturing

from corematching import CoreMatching
from corematching.model.hooks import (
    HookMonitor,
    ShapeReader,
    captures_outputs,
    promise_input,
    reads_shapes,
)
from tests.models import build, make_inputs
from tests.runtime.families import generate


def watched(*arguments):
    """A hook that changes nothing."""


@pytest.mark.parametrize("hook", [watched, functools.partial(watched, 1)])
def test_any_hook_is_seen(hook):
    module = nn.Linear(2, 2)
    watch = HookMonitor([module])
    assert not watch.sees_any()
    handle = module.register_forward_hook(hook)
    assert watch.sees_any()
    handle.remove()
    assert not watch.sees_any()


def test_own_hooks_are_passed_over_and_those_of_the_same_name_are_not():
    module, layer = nn.Linear(2, 2), nn.Linear(2, 2)
    watch = HookMonitor([module], ignored=[reads_shapes, captures_outputs])
    module.register_forward_hook(ShapeReader(lambda *_: None))
    output_capturing.install_output_capuring_hook(module, "hidden_states", 0)
    assert len(module._forward_hooks) == 2 and not watch.sees_any()
    output_capturing.install_output_capuring_hook(layer, "hidden_states", 0)
    (theirs,) = layer._forward_hooks.values()
    for name in ("_count", "output_capturing_hook"):

        def hook(*_):
            """Somebody's own."""

        hook.__name__ = hook.__qualname__ = name
        for own in (hook, functools.partial(hook, 1), functools.wraps(theirs)(hook)):
            handle = module.register_forward_hook(own)
            assert watch.sees_any()
            handle.remove()
    assert not watch.sees_any()


@pytest.mark.parametrize("name", ["_count", "output_capturing_hook"])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_hook_of_any_name_changes_what_is_answered(name, engine):
    model = build("llava")
    inputs = make_inputs("llava", model)

    def hook(module, args, output):
        return 0 * output

    hook.__name__ = hook.__qualname__ = name
    with torch.no_grad(), CoreMatching()(model, engine=engine):
        plain = generate(model, inputs).logits
        places = (
            model.model.vision_tower.encoder.layers[0].mlp.fc1,
            model.get_decoder().layers[3].input_layernorm,
            model.get_decoder().norm,
        )
        for place in places:
            handle = place.register_forward_hook(hook)
            changed = generate(model, inputs).logits
            handle.remove()
            assert not torch.allclose(changed[:, 0], plain[:, 0], atol=1e-3)
        assert torch.equal(generate(model, inputs).logits, plain)


def test_a_hook_on_all_modules_is_seen():
    watch = HookMonitor([])
    handle = nn.modules.module.register_module_forward_hook(watched)
    try:
        assert watch.sees_any()
    finally:
        handle.remove()
    assert not watch.sees_any()


class Patient:
    """A hook that can do without the input."""

    def __init__(self):
        self.promised, self.seen = [], []

    def __call__(self, module, args):
        self.seen.append(args[0])

    def promise(self, source, make):
        self.promised.append((source, make))


def test_an_input_is_promised_to_hooks_that_can_wait_and_to_them_only():
    def make():
        raise AssertionError("nobody asked for it")

    module, x, hook = nn.Linear(2, 2), torch.ones(1, 2), Patient()
    assert promise_input(module, x, make)  # nobody looks
    module.register_forward_pre_hook(hook)
    assert promise_input(module, x, make) and hook.promised == [(x, make)]
    module.register_forward_pre_hook(watched)
    assert not promise_input(module, x, make) and len(hook.promised) == 1
    assert not hook.seen
