"""Replacing a method on one instance, in a way that can be undone without a trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MISSING = object()


class InstancePatches:
    """Methods replaced on single objects, never on their classes."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace ``owner.name`` by ``around(original, *args, **kwargs)``."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self._undo.append((owner, name, vars(owner).get(name, _MISSING)))
        vars(owner)[name] = wrapper

    def undo(self) -> None:
        """Put every replaced method back, the last one first."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before
