"""Sparse FFNs whose dense weights are in memory for prompts only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from corematching.backends.sparse_ffn import SparseFFN
from corematching.errors import InputError
from corematching.model.absent import AbsentWeight
from corematching.offload.memory import bytes_of
from corematching.protocol import NeuronChoice


class StreamedFFN(SparseFFN):
    """A sparse FFN whose dense weights are in memory for prompts only.

    Its chosen neurons are copied as soon as they are known. Weights that are still absent are
    checked during the first prompt.

    Parameters
    ----------
    mlp : nn.Module
        As in `SparseFFN`.
    count : int
        Neurons of each choice.
    present : callable
        ``present()`` is a context in which the dense weights are in memory.
    """

    def __init__(
        self, mlp: nn.Module, count: int, present: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._present, self._checked = present, False
        super().__init__(mlp, count)

    def check(self) -> None:
        """Compare the weights with the FFN's own forward, unless they are absent."""
        weights = (linear.weight for linear in self.mlp.modules() if isinstance(linear, nn.Linear))
        if not any(isinstance(weight, AbsentWeight) for weight in weights):
            self._checked = True
            self.parts.check()

    def weights_present(self) -> AbstractContextManager[None]:
        """A context in which all neurons' weights are in memory."""
        return self._present()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, d) to (B, T, d), on the chosen neurons where T is 1 and a choice is set."""
        if self.active and x.dim() == 3 and x.shape[1] == 1:
            return super().forward(x, *args, **kwargs)
        with self.weights_present(), torch.no_grad():
            out = super().forward(x, *args, **kwargs)
            if not self._checked:
                self._compare(x[:, -2:], out[:, -2:])
        wanted = any(y.requires_grad for y in (x, *self.mlp.parameters()))
        if torch.is_grad_enabled() and wanted:
            out = cast(Tensor, _NoGradient.apply(out, torch.zeros((), requires_grad=True)))
        return out

    def _compare(self, x: Tensor, out: Tensor) -> None:
        """Check the weights on the first sample with finite inputs, if any."""
        finite = x.isfinite().flatten(1).all(1).nonzero()
        if len(finite):
            sample = int(finite[0])
            self.parts.compare(x[sample], out[sample])
            self._checked = True

    def take(self, choice: NeuronChoice) -> None:
        """Take a choice and copy its neurons."""
        with self.weights_present():
            super().take(choice)
            super().gather(copies=True)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copied neurons and the bias."""
        held = [] if self._weights is None else self._weights.tensors
        return bytes_of([*held, *([] if self._bias is None else [self._bias])])


class _NoGradient(torch.autograd.Function):
    """The identity, with a backward that raises: the FFN weights are outside memory by then."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(
            "gradients need the FFN weights, which memory=... keeps outside: remove the method, or "
            "install it without memory, before training or computing gradients"
        )
