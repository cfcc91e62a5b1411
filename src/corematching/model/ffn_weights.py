"""The dense weights of an FFN by neuron, and its activation function by name.

Shapes: d hidden size, F intermediate neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class FFNWeights:
    """The dense weights of an FFN by neuron: views, never copies.

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


def activation_name(function: Any) -> str | None:
    """The name of an activation function out of `ACTIVATIONS`, by its values; None for others."""
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
