"""Linear layers: their shape, and whether they only multiply by the weight that they store."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from corematching.model.patching import has_foreign_forward


def linear_shape(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantised ones and GPT-2's Conv1D included."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    rows, columns = module.weight.shape
    return int(rows), int(columns)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised ones included, that contains no other."""
    inner = (child for child in module.modules() if child is not module)
    return hasattr(module, "in_features") and not any(hasattr(x, "in_features") for x in inner)


def is_plain_linear(module: Any) -> bool:
    """Whether code that reads a module's weight and bias computes what its forward does.

    False for subclasses of ``nn.Linear``, replaced forwards, weights that are computed from others
    (parametrizations) and weights of another tensor class.
    """
    if type(module) is not nn.Linear or has_foreign_forward(module):
        return False
    stored = module._parameters
    weight = stored.get("weight")
    return "bias" in stored and weight is not None and type(weight.data) is Tensor


def is_parametrized(module: nn.Module) -> bool:
    """Whether a module's weight is computed from other tensors at each access."""
    return "weight" in getattr(module, "parametrizations", ())


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer, or None where it is packed."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None
