"""Detects changes of a model's modules, forwards and weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from corematching.model.patching import foreign_forward


class _Children:
    """The direct submodules of some modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._found: list[tuple[dict[str, Any], str, Any]] = [
            (m._modules, name, child) for m in modules for name, child in m._modules.items()
        ]

    def unchanged(self) -> bool:
        """Whether each is still the same object."""
        return all(children.get(name) is child for children, name, child in self._found)


class WeightSnapshot:
    """A snapshot of modules, their submodules and the addresses of their parameters.

    Parameters
    ----------
    modules : iterable of nn.Module
        The modules, with all their submodules.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        every = [inner for module in modules for inner in module.modules()]
        self._children = _Children(every)
        self._parameters: list[tuple[dict[str, Any], str, int]] = [
            (m._parameters, name, _address(parameter))
            for m in every
            for name, parameter in m._parameters.items()
        ]

    def unchanged(self) -> bool:
        """Whether every module and parameter is the same; False for a snapshot without any."""
        if not self._parameters or not self._children.unchanged():
            return False
        for parameters, name, address in self._parameters:
            if _address(parameters.get(name)) != address:
                return False
        return True


class ModuleSnapshot:
    """A snapshot of a model's modules and their forwards, without its parameters.

    Parameters
    ----------
    model : nn.Module
        The model, with our own patches on it.
    """

    def __init__(self, model: nn.Module) -> None:
        every = list(model.modules())
        self._children = _Children(every)
        self._forwards = [(m, vars(m), vars(m).get("forward"), foreign_forward(m)) for m in every]

    def unchanged(self) -> bool:
        """Whether no module and no forward was replaced or restored by other code."""
        if not self._children.unchanged():
            return False
        for module, attributes, forward, foreign in self._forwards:
            if attributes.get("forward") is not forward and foreign_forward(module) is not foreign:
                return False
        return True


def _address(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()
