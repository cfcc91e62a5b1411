"""Gates of a prompt's text tokens, kept by the product that computes them for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class GateRequest:
    """Whose gate somebody will ask for.

    Attributes
    ----------
    rows : Tensor
        (B, R) long, tokens of each sample.
    slots : Tensor
        (B * T,) int32, where the gate of each token goes among B * R, or -1.
    same : Tensor or None
        Other rows that were found to be equal to these.
    """

    rows: Tensor
    slots: Tensor
    same: Tensor | None = None

    def lists(self, rows: Tensor) -> bool:
        """Whether these, (B, R), are its rows; not compared again for every layer."""
        if rows is not self.same and torch.equal(rows, self.rows):
            self.same = rows
        return rows is self.same


def make_gate_request(tokens: Tensor) -> GateRequest:
    """The request for some tokens, (B, T) bool; of samples with fewer, others in their order."""
    batch, length = tokens.shape
    most = int(tokens.sum(1).max())
    rows = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    slots = torch.full((batch, length), -1, dtype=torch.int32)
    numbers = torch.arange(batch * most, dtype=torch.int32).view(batch, most)
    return GateRequest(rows, slots.scatter(1, rows, numbers).flatten())


class GateStore:
    """Between who computes FFNs and who reads their gates: one FFN's at a time."""

    def __init__(self) -> None:
        self._gate_request: GateRequest | None = None
        self._owner: Any = None
        self._inputs: Tensor | None = None
        self._kept: Tensor | None = None

    def ask(self, mlp: Any, request: GateRequest | None) -> None:
        """``mlp`` runs next, and the gate of these tokens is wanted."""
        self._owner, self._gate_request = mlp, request
        self._inputs = self._kept = None

    def make_room(self, mlp: Any, x: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
        """Places and a tensor for the gates of ``mlp`` on x (B, T, d); None if none are wanted."""
        request = self._gate_request
        if request is None or self._owner is not mlp or request.slots.numel() != x[..., 0].numel():
            return None
        self._inputs, self._kept = x, x.new_empty(*request.rows.shape, width)
        return request.slots, self._kept

    def find(self, mlp: Any, x: Tensor | None, rows: Tensor) -> Tensor | None:
        """(B, R, F), what was kept of ``mlp`` on this very x for these rows, or None."""
        request = self._gate_request
        if request is None or self._kept is None or self._owner is not mlp or self._inputs is not x:
            return None
        return self._kept if request.lists(rows) else None

    def forget(self) -> None:
        """Let go of everything."""
        self.ask(None, None)
