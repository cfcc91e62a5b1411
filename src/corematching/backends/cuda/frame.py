"""The static tensors of a captured decode step.

Shapes: B samples, S columns of the buffer, d hidden size, G key-value heads, D head dimension,
L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class FixedLayer(StaticLayer):
    """A cache layer that stores a token in the column given by a tensor, and returns all columns.

    Parameters
    ----------
    keys, values : Tensor
        (B, G, S, D) each.
    column : Tensor
        (1,) long, the column of the next token.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column = keys, values, column
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Store a token's keys and values, (B, G, 1, D) each; returns all, (B, G, S, D) each."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


@dataclass
class Frame:
    """The tensors that a captured step reads and writes.

    Attributes
    ----------
    form : tuple
        The key of the tensors' shapes and dtypes.
    buffer : Tensor
        (2 * L, B, G, S, D), keys and values of all layers.
    x, out : Tensor
        (B, 1, d) each, the first layer's input and the final norm's output.
    positions : Tensor
        The decoder's ``position_ids``.
    column : Tensor
        (1,) long, the column of this token's keys and values.
    mask : Tensor
        (B, 1, 1, S), bool for sdpa, additive for eager attention or log counts.
    cache : Cache
        The buffer as the decoder's ``past_key_values``.
    users : int
        References to the buffer's storage while no other cache uses it.
    addresses : tuple of int
        Addresses of the choices' tensors in the captured step; empty before the first step.
    recorder : Any
        The captured step; None before the capture.
    """

    form: tuple[Any, ...]
    buffer: Tensor
    x: Tensor
    out: Tensor
    positions: Tensor
    column: Tensor
    mask: Tensor
    cache: Cache
    users: int = 0
    addresses: tuple[int, ...] = ()
    recorder: Any = None

    @property
    def columns(self) -> int:
        """S."""
        return self.buffer.shape[3]

    @property
    def is_free(self) -> bool:
        """Whether nothing else references the buffer any more."""
        return count_users(self.buffer) == self.users


def make_frame(form: tuple[Any, ...], buffer: Tensor, x: Tensor, positions: Tensor) -> Frame:
    """Create a frame for tokens like ``x`` and positions like ``positions``.

    Parameters
    ----------
    form : tuple
        As in `Frame`; the last item is whether masks are additive.
    buffer : Tensor
        (2 * L, B, G, S, D); overwritten with zeros.
    x, positions : Tensor
        Inputs of a first step.
    """
    buffer.zero_()  # masked columns must be finite
    batch, columns = x.shape[0], buffer.shape[3]
    column = torch.zeros(1, dtype=torch.long, device=x.device)
    halves = zip(buffer[::2].unbind(0), buffer[1::2].unbind(0), strict=True)
    layers: list[Any] = [FixedLayer(keys, values, column) for keys, values in halves]
    kind = x.dtype if form[-1] else torch.bool
    return Frame(
        form=form,
        buffer=buffer,
        x=torch.empty_like(x),
        out=torch.empty_like(x),
        positions=torch.empty_like(positions),
        column=column,
        mask=torch.zeros(batch, 1, 1, columns, dtype=kind, device=x.device),
        cache=Cache(layers=layers),
        users=count_users(buffer),
    )


def count_users(tensor: Tensor) -> int:
    """References to a tensor's storage; a new negative number where torch cannot count them."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return -id(object())
    return int(count(tensor.untyped_storage()._cdata))


def show_columns(mask: Tensor, visible: Tensor, log_counts: Tensor | None = None) -> None:
    """Fill a mask with the visible columns; all columns from K on are hidden.

    Parameters
    ----------
    mask : Tensor
        (B, 1, 1, S), changed in place; additive where ``log_counts`` are given.
    visible : Tensor
        (B or 1, K) bool, for the K columns in use.
    log_counts : Tensor or None
        (B, up to K), the bias of the first columns' scores.
    """
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask[..., visible.shape[1] :].fill_(hidden)
    seen = visible[:, None, None]
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, hidden)
    mask[..., : visible.shape[1]].copy_(seen.expand(mask.shape[0], -1, -1, -1))
    if log_counts is not None:
        mask[..., : log_counts.shape[1]].add_(log_counts[:, None, None])
