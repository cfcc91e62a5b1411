"""Finds a decoder layer's attention and its output projection."""

from __future__ import annotations

from torch import nn

from corematching.errors import UnsupportedModelError


def find_attention(layer: nn.Module) -> nn.Module | None:
    """The layer's self-attention, or None."""
    for name in ("self_attn", "attention", "attn", "self_attention"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def output_projection(module: nn.Module) -> nn.Module:
    """An attention's output projection.

    Raises
    ------
    UnsupportedModelError
        There is none under a known name.
    """
    for name in ("o_proj", "out_proj", "dense", "wo"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module):
            return projection
    raise UnsupportedModelError(
        f"{type(module).__name__} has no output projection under a known name: "
        "choose a token score that needs no contributions"
    )
