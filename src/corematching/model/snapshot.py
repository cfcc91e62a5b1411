"""Notices that modules or their weights are not what they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from corematching.model.patching import foreign_forward


class WeightSnapshot:
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
            (m._parameters, name, _place(parameter))
            for m in every
            for name, parameter in m._parameters.items()
        ]

    def unchanged(self) -> bool:
        """Whether every module and every parameter is where it was; nothing remembered: no."""
        if not self._parameters:
            return False
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for parameters, name, place in self._parameters:
            if _place(parameters.get(name)) != place:
                return False
        return True


class ModuleSnapshot:
    """Remembers a model's modules and their forwards, whatever their parameters are.

    Parameters
    ----------
    model : nn.Module
        With everything below it, and with our own patches on it.
    """

    def __init__(self, model: nn.Module) -> None:
        every = list(model.modules())
        self._children = [
            (m._modules, name, child) for m in every for name, child in m._modules.items()
        ]
        self._forwards = [(m, vars(m), vars(m).get("forward"), foreign_forward(m)) for m in every]

    def unchanged(self) -> bool:
        """Whether no module was replaced, and nobody else has put on or taken off a forward."""
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for module, attributes, forward, foreign in self._forwards:
            if attributes.get("forward") is not forward and foreign_forward(module) is not foreign:
                return False
        return True


def _place(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()
