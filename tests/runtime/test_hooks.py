from __future__ import annotations

import functools

import pytest
from torch import nn

from corematching.runtime.hooks import HookWatch


def watched(*arguments):
    """A hook that changes nothing."""


@pytest.mark.parametrize("hook", [watched, functools.partial(watched, 1)])
def test_any_hook_is_seen(hook):
    module = nn.Linear(2, 2)
    watch = HookWatch([module])
    assert not watch.sees_any()
    handle = module.register_forward_hook(hook)
    assert watch.sees_any()
    handle.remove()
    assert not watch.sees_any()


def test_a_named_function_is_passed_over_and_a_nameless_one_is_not():
    module = nn.Linear(2, 2)
    watch = HookWatch([module], ignored=["watched"])
    module.register_forward_pre_hook(watched)
    assert not watch.sees_any()
    module.register_forward_hook(functools.partial(watched, 1))
    assert watch.sees_any()


def test_a_hook_on_all_modules_is_seen():
    watch = HookWatch([])
    handle = nn.modules.module.register_module_forward_hook(watched)
    try:
        assert watch.sees_any()
    finally:
        handle.remove()
    assert not watch.sees_any()
