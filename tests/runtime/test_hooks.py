from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from corematching.model.hooks import HookMonitor, promise_input


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


def test_a_named_function_is_passed_over_and_a_nameless_one_is_not():
    module = nn.Linear(2, 2)
    watch = HookMonitor([module], ignored=["watched"])
    module.register_forward_pre_hook(watched)
    assert not watch.sees_any()
    module.register_forward_hook(functools.partial(watched, 1))
    assert watch.sees_any()


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
