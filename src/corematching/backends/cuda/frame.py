"""The tensors on which a captured decode step runs, and what lays a cache into them.

Shapes: B samples, S columns of the buffer, d hidden size, G heads for keys and values, D their
size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class FixedLayer(StaticLayer):
    """A cache layer that stores one token where a tensor says, and shows all columns.

    Parameters
    ----------
    keys, values : Tensor
        (B, G, S, D).
    column : Tensor
        (1,) long.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column = keys, values, column
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Store a token's keys and values, (B, G, 1, D) each."""
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
        What the tensors' shapes follow from.
    buffer : Tensor
        (2 * L, B, G, S, D), keys and values of all layers.
    x, out : Tensor
        (B, 1, d), in front of the first layer and behind the final norm.
    positions : Tensor
        As the decoder takes them.
    column : Tensor
        (1,) long, where this token's keys and values go.
    mask : Tensor
        (B, 1, 1, S), bool for sdpa, additive for eager attention.
    cache : Cache
        The buffer, as the decoder takes it.
    users : int
        References to the buffer's memory while no other cache shows it.
    addresses : tuple of int
        Of all that else the captured step reads.
    recorder : Any
        The captured step.
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
        """Whether nobody else can see the buffer any more."""
        return count_users(self.buffer) == self.users


def make_frame(form: tuple[Any, ...], buffer: Tensor, x: Tensor, positions: Tensor) -> Frame:
    """A frame for tokens like ``x`` at places like ``positions``.

    Parameters
    ----------
    form : tuple
        As `Frame` has it; the last item says whether masks are additive.
    buffer : Tensor
        (2 * L, B, G, S, D) of any values.
    x, positions : Tensor
        Of a first step.
    """
    buffer.zero_()  # what no one sees must still be numbers
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
    """How many tensors show this one's memory; ever new numbers where torch does not say."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return -id(object())
    return int(count(tensor.untyped_storage()._cdata))


def show_columns(mask: Tensor, visible: Tensor, log_counts: Tensor | None = None) -> None:
    """Let attention see some of the first columns and none behind them.

    Parameters
    ----------
    mask : Tensor
        (B, 1, 1, S), changed in place; additive where ``log_counts`` are given.
    visible : Tensor
        (B or 1, K) bool, K columns that store something.
    log_counts : Tensor or None
        (B, up to K), what is added to the scores of the first columns.
    """
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask[..., visible.shape[1] :].fill_(hidden)
    seen = visible[:, None, None]
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, hidden)
    mask[..., : visible.shape[1]].copy_(seen.expand(mask.shape[0], -1, -1, -1))
    if log_counts is not None:
        mask[..., : log_counts.shape[1]].add_(log_counts[:, None, None])
