"""The output projection of decode steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corematching.backends.cpu.native import (
    MAX_BATCH,
    linear,
    use_large_pages,
    why_unsupported_matrix,
)
from corematching.model.linear import is_plain_linear
from corematching.model.patching import Patches


class NativeHead:
    """Runs the output projection of decode steps in compiled code.

    Parameters
    ----------
    model : nn.Module
        A model with output embeddings.
    """

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()
        self._patches = Patches()

    def install(self) -> None:
        """Replace the projection's forward on its instance, where it is a plain linear layer."""
        head = self._head
        if is_plain_linear(head):
            if why_unsupported_matrix(head.weight) is None:
                use_large_pages([head.weight])
            self._patches.wrap(head, "forward", self._forward)

    def remove(self) -> None:
        """Restore the projection's own forward."""
        self._patches.undo()

    def _forward(self, original: Any, x: Tensor) -> Tensor:
        weight, bias = self._head.weight, self._head.bias
        single = x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= MAX_BATCH
        if (
            not single
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or x.dtype != weight.dtype
            or why_unsupported_matrix(weight) is not None
        ):
            return original(x)
        return linear(x[:, 0], weight, bias)[:, None]
