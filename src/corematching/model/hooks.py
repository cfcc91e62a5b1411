"""Notices that somebody's hooks want to see what modules do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CAPTURING_MODULE = "transformers.utils.output_capturing"


def captures_outputs(hook: Any) -> bool:
    """Whether a hook is transformers' own; behind an attention these collect its weights."""
    namespace = getattr(hook, "__globals__", {})
    return bool(namespace.get("__name__") == CAPTURING_MODULE)


def reads_shapes(hook: Any) -> bool:
    """Whether a hook is a `ShapeReader`."""
    return isinstance(hook, ShapeReader)


def stay_eager(function: Any) -> Any:
    """Like `torch.compiler.disable`, for functions that run at every layer: free outside graphs."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class HookMonitor:
    """The forward hooks of some modules, whoever puts them there and whenever.

    Parameters
    ----------
    modules : iterable of nn.Module
    ignored : iterable of callable
        Hooks for which one of these gives True do not count.
    called : iterable of nn.Module
        Modules whose hooks in front of them the caller runs (`promise_input`, `run_pre_hooks`):
        only those behind them count.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        ignored: Iterable[Callable[[Any], bool]] = (),
        called: Iterable[nn.Module] = (),
    ) -> None:
        self._hooks: list[Any] = [
            hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)
        ]
        self._hooks += [m._forward_hooks for m in called]
        self._ignored = tuple(ignored)

    def sees_any(self) -> bool:
        """Whether there are hooks on these modules, or on all modules there are."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return True
        if not any(self._hooks):
            return False
        if not self._ignored:
            return True
        every = (hook for hooks in self._hooks for hook in hooks.values())
        return not all(any(ignores(hook) for ignores in self._ignored) for hook in every)


class Reader:
    """A hook in front of a module that only reads what enters it.

    It may run late, when the module has done its work already.

    Parameters
    ----------
    read : callable
        ``read(x)`` gets what enters the module.
    """

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        self._read = read

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._read(args[0])


class ShapeReader:
    """A hook behind a module that only reads the shape of what it gives: `show_result` serves it.

    Parameters
    ----------
    read : callable
        ``read(module, args, output)``.
    """

    def __init__(self, read: Callable[[nn.Module, Any, Tensor], None]) -> None:
        self._read = read

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._read(module, args, output)


def may_run_late(module: nn.Module) -> bool:
    """Whether all hooks in front of a module are readers."""
    return all(isinstance(hook, Reader) for hook in module._forward_pre_hooks.values())


def run_pre_hooks(module: nn.Module, x: Tensor) -> Tensor:
    """Run the hooks in front of a module that gets ``x`` and nothing else; gives what they pass on.

    Parameters
    ----------
    module : nn.Module
        One that is not called itself, because somebody else computes what it would.
    x : Tensor

    Returns
    -------
    Tensor
        ``x``, or what the last hook that changed it made of it.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, (x,), {})
            changed = changed if changed is None else changed[0]
        else:
            changed = hook(module, (x,))
        if changed is not None:
            x = changed[0] if isinstance(changed, tuple) else changed
    return x


def promise_input(module: nn.Module, source: Tensor, make: Callable[[], Tensor]) -> bool:
    """Run the hooks in front of a module without its input, where each of them can do without.

    Such a hook has a method ``promise(source, make)``.

    Parameters
    ----------
    module : nn.Module
        One that is not called itself.
    source : Tensor
        What its input would be made of.
    make : callable
        ``make()`` gives the input.

    Returns
    -------
    bool
        False, and nothing done, where a hook needs it now.
    """
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    if not all(hasattr(hook, "promise") for hook in hooks):
        return False
    for hook in hooks:
        hook.promise(source, make)
    return True


def show_result(module: nn.Module, x: Tensor, out: Tensor) -> None:
    """Run the hooks behind a module that was computed without being called; they change nothing."""
    for key, hook in list(module._forward_hooks.items()):
        given: tuple[Any, ...] = ((x,), {}) if key in module._forward_hooks_with_kwargs else ((x,),)
        hook(module, *given, out)
