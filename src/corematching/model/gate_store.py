"""Keeps the gates of some of a prompt's tokens while its FFNs run.

Shapes: B samples, T tokens, R requested tokens per sample, d hidden size, F intermediate neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class GateRequest:
    """The tokens whose gates are to be kept.

    Attributes
    ----------
    rows : Tensor
        (B, R) long, the requested tokens of each sample.
    slots : Tensor
        (B * T,) int32, each token's index among the B * R kept gates, or -1.
    same : Tensor or None
        The last tensor that compared equal to ``rows``.
    """

    rows: Tensor
    slots: Tensor
    same: Tensor | None = None

    def lists(self, rows: Tensor) -> bool:
        """Whether ``rows`` (B, R) are the requested ones; compared once, not for every layer."""
        if rows is not self.same and torch.equal(rows, self.rows):
            self.same = rows
        return rows is self.same


def make_gate_request(tokens: Tensor) -> GateRequest:
    """The request for the tokens of a (B, T) bool mask; shorter samples are padded with others."""
    batch, length = tokens.shape
    most = int(tokens.sum(1).max())
    rows = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    slots = torch.full((batch, length), -1, dtype=torch.int32)
    numbers = torch.arange(batch * most, dtype=torch.int32).view(batch, most)
    return GateRequest(rows, slots.scatter(1, rows, numbers).flatten())


class GateStore:
    """Passes gates from the code that computes FFNs to policies, for one FFN at a time."""

    def __init__(self) -> None:
        self._gate_request: GateRequest | None = None
        self._owner: Any = None
        self._inputs: Tensor | None = None
        self._kept: Tensor | None = None

    def ask(self, mlp: Any, request: GateRequest | None) -> None:
        """Request the gates of ``mlp``, which runs next; None requests nothing."""
        self._owner, self._gate_request = mlp, request
        self._inputs = self._kept = None

    def make_room(self, mlp: Any, x: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
        """Slots (B * T,) and output (B, R, F) for the gates of ``mlp`` on x (B, T, d), or None."""
        request = self._gate_request
        if request is None or self._owner is not mlp or request.slots.numel() != x[..., 0].numel():
            return None
        self._inputs, self._kept = x, x.new_empty(*request.rows.shape, width)
        return request.slots, self._kept

    def find(self, mlp: Any, x: Tensor | None, rows: Tensor) -> Tensor | None:
        """(B, R, F), the kept gates of ``mlp`` on this very x for these rows, or None."""
        request = self._gate_request
        if request is None or self._kept is None or self._owner is not mlp or self._inputs is not x:
            return None
        return self._kept if request.lists(rows) else None

    def forget(self) -> None:
        """Release the request and the gates."""
        self.ask(None, None)
