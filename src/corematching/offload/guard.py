"""Refuses to save, load or convert a model with absent weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import CoreMatchingError
from corematching.model.patching import Patches

SAVING = ("save_pretrained", "push_to_hub")
"""Methods of whole models that read all weights, refused before they write anything."""
READING = ("state_dict", "load_state_dict")
"""Methods of every module that read or write all of its weights."""


class WeightGuard:
    """Patches on a model, and on its modules with absent weights.

    Each raises before anything has changed. Conversions without effect, such as ``.to()`` the
    model's own device and dtype, pass.

    Parameters
    ----------
    model : nn.Module
        The model.
    weights : iterable of Tensor
        The absent weights.
    make_error : callable
        ``make_error(what)`` makes the error; ``what`` names the operation.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[Tensor],
        make_error: Callable[[str], CoreMatchingError],
    ) -> None:
        self._make_error = make_error
        self._patches = Patches()
        self._model, self._holders = model, _holders(model, {id(weight) for weight in weights})

    def install(self) -> None:
        """Install the patches, from the model down: the outermost one raises first."""
        for name in SAVING if self._holders else ():
            if hasattr(self._model, name):
                self._patches.wrap(self._model, name, functools.partial(self._raise, name))
        for module in self._holders:
            for name in READING:
                self._patches.wrap(module, name, functools.partial(self._raise, name))
            self._patches.wrap(module, "_apply", functools.partial(self._convert, module))

    def remove(self) -> None:
        """Undo the patches."""
        self._patches.undo()

    def _raise(self, name: str, *_: Any, **__: Any) -> Any:
        raise self._make_error(f"{name}()")

    def _convert(self, module: nn.Module, _: Any, fn: Any, *__: Any, **___: Any) -> nn.Module:
        """Replace ``_apply``, which runs ``fn`` on every parameter and buffer."""
        home = next(p.device for p in self._model.parameters() if not p.is_meta)
        tensors = [*module.parameters(), *module.buffers()]
        kinds = {(x.dtype, home if x.is_meta else x.device) for x in tensors}
        for kind, device in kinds:
            probe = torch.empty(1, dtype=kind, device=device)
            shared = probe.is_shared()
            if fn(probe) is not probe or probe.is_shared() != shared:
                raise self._make_error("a conversion (to(), half(), cuda(), ...)")
        return module


def _holders(model: nn.Module, weights: set[int]) -> list[nn.Module]:
    """The modules that contain any of these parameters at any depth, the outermost first."""
    paths: set[str] = set()
    for path, module in model.named_modules():
        if any(id(parameter) in weights for parameter in module._parameters.values()):
            parts = path.split(".") if path else []
            paths |= {".".join(parts[:count]) for count in range(len(parts) + 1)}
    return [module for path, module in model.named_modules() if path in paths]
