"""Small prefill views for the tests of the policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from corematching.protocol import PrefillView


def make_view(kinds: list[str], activations: Any = None, **parts: Any) -> PrefillView:
    """A view from one string per sample: ``.`` padding, ``t`` text, ``i`` image."""
    valid = torch.tensor([[kind != "." for kind in sample] for sample in kinds])
    image = torch.tensor([[kind == "i" for kind in sample] for sample in kinds])
    if activations is not None:
        activations = torch.as_tensor(activations)
    parts.setdefault("layer", 4)
    return PrefillView(num_layers=30, valid=valid, image=image, activations=activations, **parts)


def show_rows(values: Tensor) -> Callable[[Tensor], Tensor]:
    """A view's part that is shown for some tokens: rows (B, R) of ``values`` (B, T, F)."""
    return lambda rows: values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def pad_left(view: PrefillView, pad: int, filler: float) -> PrefillView:
    """The same view behind ``pad`` padding tokens whose activations are ``filler``."""

    def extend(tensor: Tensor, value: Any) -> Tensor:
        shape = (tensor.shape[0], pad, *tensor.shape[2:])
        return torch.cat([torch.full(shape, value, dtype=tensor.dtype), tensor], dim=1)

    assert view.activations is not None
    return PrefillView(
        layer=view.layer,
        num_layers=view.num_layers,
        valid=extend(view.valid, False),
        image=extend(view.image, False),
        activations=extend(view.activations, filler),
        down_proj=view.down_proj,
    )
