"""Notices that somebody's hooks want to see what modules do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class HookWatch:
    """The forward hooks of some modules, whoever puts them there and whenever.

    Parameters
    ----------
    modules : iterable of nn.Module
    ignored : str
        Functions of this name do not count.
    """

    def __init__(self, modules: Iterable[nn.Module], ignored: str = "") -> None:
        self._hooks: list[Any] = [
            hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)
        ]
        self._ignored = ignored

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
        return any(getattr(hook, "__name__", "") != self._ignored for hook in every)
