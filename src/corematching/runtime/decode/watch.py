"""Notices that modules or their weights are not what they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Watch:
    """Remembers modules, what they are made of, and where their parameters lie.

    Parameters
    ----------
    modules : iterable of nn.Module
        Each with everything below it.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        every = [inner for module in modules for inner in module.modules()]
        self._children: list[tuple[dict[str, Any], str, Any]] = [
            (m._modules, name, child) for m in every for name, child in m._modules.items()
        ]
        self._parameters: list[tuple[dict[str, Any], str, int]] = [
            (m._parameters, name, parameter.data_ptr())
            for m in every
            for name, parameter in m._parameters.items()
            if parameter is not None
        ]

    def unchanged(self) -> bool:
        """Whether every module and every parameter is where it was; nothing remembered: no."""
        if not self._parameters:
            return False
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for parameters, name, place in self._parameters:
            parameter = parameters.get(name)
            if parameter is None or parameter.data_ptr() != place:
                return False
        return True
