"""What a kernel gets and gives: an FFN's weights, the chosen neurons, and who computes them.

Shapes: B rows of the batch, S sets of neurons, K neurons per set, C biases, d hidden size,
F intermediate neurons. Consecutive rows share a set: row b computes set ``b // (B / S)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class FFNWeights:
    """The dense weights of an FFN as a kernel reads them: views, never copies.

    Attributes
    ----------
    up : Tensor
        (F, d), one neuron per contiguous row.
    down_t : Tensor
        (F, d), the transposed weight of the down projection, one neuron per contiguous row.
    gate : Tensor or None
        (F, d); None in an FFN without a gate.
    up_bias, gate_bias : Tensor or None
        (F,).
    activation : str
        One of `ACTIVATIONS`.
    """

    up: Tensor
    down_t: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    activation: str = "silu"


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

    def refuse(self, weights: FFNWeights) -> str | None:
        """Why this kernel cannot run on these weights, in a few words; None if it can."""
        ...

    def prepare(self, weights: FFNWeights, sets: NeuronSets, previous: Any = None) -> Any:
        """What depends on the choice and not on the token; ``previous`` may be reused in place."""
        ...

    def run(self, x: Tensor, weights: FFNWeights, prepared: Any) -> Tensor:
        """One decode step: (B, d) to (B, d)."""
        ...


def activation_name(function: Any) -> str | None:
    """Which of `ACTIVATIONS` a model's activation function computes, found by trying it."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }
    device = torch.device("cpu")
    if isinstance(function, nn.Module):
        device = next((p.device for p in function.parameters()), device)
    with torch.inference_mode(False), torch.no_grad():
        x = torch.linspace(-6.0, 6.0, 97, device=device)
        try:
            y = function(x)
        except (RuntimeError, TypeError):
            return None
        for name, own in known.items():
            if (
                isinstance(y, Tensor)
                and y.shape == x.shape
                and torch.allclose(y, own(x), atol=1e-5)
            ):
                return name
    return None
