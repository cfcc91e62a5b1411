"""The time and the FLOPs of a vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from corematching.model.hooks import ShapeReader
from corematching.model.linear import is_linear, linear_shape
from corematching.model.patching import Patches
from corematching.runtime.record import Mark, mark


class VisionMeter:
    """Measures the time and the FLOPs of a vision tower since the last `take`.

    FLOPs cover the tower's linear and convolution layers, from the shapes that ran, without the
    attention over pairs of patches.

    Parameters
    ----------
    tower : nn.Module or None
        The vision tower.
    device : torch.device
        The device of its work.
    """

    def __init__(self, tower: nn.Module | None, device: torch.device) -> None:
        self.tower, self.device = tower, device
        self.spans: list[tuple[Mark, Mark]] = []
        self.macs = 0
        self._start: Mark | None = None

    def install(self, patches: Patches) -> None:
        """Put hooks on the tower."""
        if self.tower is None:
            return
        patches.add_pre_hook(self.tower, self._before)
        patches.add_hook(self.tower, self._after)
        count = ShapeReader(self._count)
        for module in self.tower.modules():
            if is_linear(module) or isinstance(module, (nn.Conv2d, nn.Conv3d)):
                patches.add_hook(module, count)

    def take(self) -> tuple[list[tuple[Mark, Mark]], int]:
        """Return the spans and the FLOPs so far, and reset them."""
        spans, macs = self.spans, self.macs
        self.spans, self.macs = [], 0
        return spans, 2 * macs

    def _before(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._start = mark(self.device)

    def _after(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self._start is not None:
            self.spans.append((self._start, mark(self.device)))

    def _count(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        kernel: Any = getattr(module, "weight", None)
        inputs = linear_shape(module)[0] if is_linear(module) else kernel[0].numel()
        self.macs += output.numel() * inputs
