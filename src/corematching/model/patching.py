"""Patches on a model, in one ordered list that can be undone without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from corematching.errors import InputError

_MISSING = object()


class Patches:
    """Methods, hooks and attributes on single objects, never on their classes.

    Each entry is listed before it takes effect, and `undo` may be called again after an interrupt,
    so an exception at any moment leaves nothing behind.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace ``owner.name`` by ``around(original, *args, **kwargs)``.

        If other code wraps the method again before `undo`, its wrapper stays, and ours inside it
        calls the original from then on.
        """
        original = getattr(owner, name)
        before = vars(owner).get(name, _MISSING)
        live = [True]

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not live:
                return original(*args, **kwargs)
            return around(original, *args, **kwargs)

        wrapper._is_ours = True  # type: ignore[attr-defined]

        def restore() -> None:
            if vars(owner).get(name) is wrapper:
                _put_back(owner, name, before)
            live.clear()

        self._undo.append(restore)
        vars(owner)[name] = wrapper

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object."""
        before = vars(owner).get(name, _MISSING)

        def restore() -> None:
            if vars(owner).get(name) is value:
                _put_back(owner, name, before)

        self._undo.append(restore)
        vars(owner)[name] = value

    def add_pre_hook(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        """Register a forward pre-hook."""
        self._undo.append(functools.partial(_remove_hook, module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)

    def add_hook(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        """Register a forward hook."""
        self._undo.append(functools.partial(_remove_hook, module, hook))
        module.register_forward_hook(hook, with_kwargs=with_kwargs)

    def forbid_copies(self, model: nn.Module) -> None:
        """Refuse ``copy.deepcopy`` and ``pickle`` of a model, or of a part of it.

        A copy would share the patches, which refer to the original's modules.
        """
        for module in model.modules():
            self.set(module, "__deepcopy__", _forbid_copy)
            self.set(module, "__reduce_ex__", _forbid_copy)

    def then(self, action: Callable[[], None]) -> None:
        """Add an action that `undo` calls in order; it may run twice."""
        self._undo.append(action)

    def undo(self) -> None:
        """Undo all entries, the last one first."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether other code replaced a module's forward on its instance.

    accelerate's hooks, which only move tensors between devices, do not count; what they call does.
    """
    function = foreign_forward(module)
    if _is_of_accelerate(function):
        function = _unwrap(vars(module).get("_old_forward"))
    return function is not None and not _is_own(function, module)


def foreign_forward(module: nn.Module) -> Any:
    """What stands in for a module's forward under our own patches; None: its class's forward."""
    function = _unwrap(vars(module).get("forward"))
    return None if _is_own(function, module) else function


def _unwrap(function: Any) -> Any:
    """What stands under our own patches of a forward."""
    while getattr(function, "_is_ours", False):
        function = function.__wrapped__
    return function


def _is_own(function: Any, module: nn.Module) -> bool:
    return getattr(function, "__func__", None) is type(module).forward


def _is_of_accelerate(function: Any) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__module__", "")).startswith("accelerate.")


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _MISSING:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = before


def _remove_hook(module: nn.Module, hook: Any) -> None:
    for hooks, marks in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    ):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            for mark in marks:
                mark.pop(key, None)


def _forbid_copy(*_: Any) -> Any:
    raise InputError(
        "a model with a method installed cannot be copied or pickled: remove the method first "
        "(leave its `with` block, or call remove(model)), then install it on the copy"
    )
