"""The interface of kernels for FFNs over chosen neurons.

Shapes: B rows of the batch, S sets of neurons, K neurons per set, C biases, d hidden size,
F intermediate neurons. Consecutive rows share a set: row b computes set ``b // (B / S)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from corematching.model.ffn_weights import FFNWeights


@dataclass(frozen=True)
class Thresholds:
    """Per-token rules, each (S,) float32 or None; see `corematching.protocol.NeuronChoice`.

    Attributes
    ----------
    input : Tensor or None
        Entries of the FFN's input with a smaller magnitude count 0.
    gate : Tensor or None
        A neuron goes on to ``up`` and ``down`` only if ``|act(gate(x))|`` reaches it.
    output : Tensor or None
        A neuron goes on to ``down`` only if its activation's magnitude reaches it.
    """

    input: Tensor | None = None
    gate: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True)
class NeuronSets:
    """The neurons that decoded tokens compute.

    Attributes
    ----------
    indices : Tensor
        (S, K) long, ascending.
    bias : Tensor or None
        (C, d), in the weights' dtype, added to the output of row b: row ``b // (B / C)``.
    thresholds : Thresholds
        Per-token rules.
    """

    indices: Tensor
    bias: Tensor | None = None
    thresholds: Thresholds = Thresholds()


class IndexedKernel(Protocol):
    """An FFN over lists of neurons, reading the dense weights in place."""

    name: str
    traceable: bool
    """Whether `run` may stand in code that ``torch.compile`` traces."""
    max_batch: int | None
    """The most rows that `run` takes; None: any number."""

    def why_unsupported(self, weights: FFNWeights) -> str | None:
        """Why this kernel cannot run on these weights, in a few words; None if it can."""
        ...

    def prepare(self, weights: FFNWeights, sets: NeuronSets, previous: Any = None) -> Any:
        """All that depends on the choice, not on the token; may reuse ``previous`` in place."""
        ...

    def run(self, x: Tensor, weights: FFNWeights, prepared: Any) -> Tensor:
        """One decode step: (B, d) to (B, d)."""
        ...
