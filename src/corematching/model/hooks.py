"""Detects forward hooks, and runs them for modules that are computed without being called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

CAPTURING_MODULE = "transformers.utils.output_capturing"


def captures_outputs(hook: Any) -> bool:
    """Whether a hook is one of transformers' own, which collect outputs and attention maps."""
    namespace = getattr(hook, "__globals__", {})
    return bool(namespace.get("__name__") == CAPTURING_MODULE)


def reads_shapes(hook: Any) -> bool:
    """Whether a hook is a `ShapeReader`."""
    return isinstance(hook, ShapeReader)


def stay_eager(function: Any) -> Any:
    """`torch.compiler.disable` without its overhead in eager mode, for functions per layer."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class HookMonitor:
    """Monitors the forward hooks and pre-hooks of some modules.

    Parameters
    ----------
    modules : iterable of nn.Module
        The modules.
    ignored : iterable of callable
        Predicates of hooks to ignore.
    called : iterable of nn.Module
        Modules whose pre-hooks the caller runs itself (`promise_input`, `run_pre_hooks`): only
        their forward hooks count.
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
        """Whether these modules have hooks, or there are global ones."""
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
    """A forward pre-hook that only reads the module's input.

    It may run late, after the module's computation.

    Parameters
    ----------
    read : callable
        ``read(x)`` gets the module's input.
    """

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        self._read = read

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._read(args[0])


class ShapeReader:
    """A forward hook that reads only the shape of the output; `show_result` can run it.

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
    """Whether all pre-hooks of a module are `Reader` hooks."""
    return all(isinstance(hook, Reader) for hook in module._forward_pre_hooks.values())


def run_pre_hooks(module: nn.Module, x: Tensor) -> Tensor:
    """Run the pre-hooks of a module that is computed without being called.

    Parameters
    ----------
    module : nn.Module
        The module.
    x : Tensor
        Its only input.

    Returns
    -------
    Tensor
        ``x`` as the hooks leave it.
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
    """Run a module's pre-hooks with a deferred input, if all of them accept one.

    Such a hook has a method ``promise(source, make)``.

    Parameters
    ----------
    module : nn.Module
        A module that is computed without being called.
    source : Tensor
        The tensor from which its input follows.
    make : callable
        ``make()`` computes the input.

    Returns
    -------
    bool
        False, and no hook has run, if one of them needs the input itself.
    """
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    if not all(hasattr(hook, "promise") for hook in hooks):
        return False
    for hook in hooks:
        hook.promise(source, make)
    return True


def show_result(module: nn.Module, x: Tensor, out: Tensor) -> None:
    """Run the forward hooks of a module that was computed without being called.

    What they return is ignored.
    """
    for key, hook in list(module._forward_hooks.items()):
        given: tuple[Any, ...] = ((x,), {}) if key in module._forward_hooks_with_kwargs else ((x,),)
        hook(module, *given, out)
