"""A cache of several conversations of different lengths, one a row, that decode together.

Shapes: B rows, G key-value heads, D head dimension, C columns of the buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from corematching.cache.pruned_cache import pruned_prompt_of

STRIDE = 64
"""The columns of a step are a multiple of this."""


class SlotCache(DynamicCache):
    """Keys and values of several conversations, each from column 0 on, in one buffer.

    A decode step reads the first `width` columns of every row and writes its token into the last
    of them; `settle` then moves it behind the row's other tokens. Columns behind a row's end are
    hidden by `mask`. So where a row's tokens stand, and how sums over them are grouped, does not
    depend on the other rows: a row gets the same numbers alone and in any batch, from kernels that
    compute rows independently.

    Parameters
    ----------
    layers, rows, heads, columns, size : int
        Decoder layers, B, G, C and D; C is rounded up to a multiple of `STRIDE`.
    dtype : torch.dtype
        The dtype of keys and values.
    device : torch.device
        Their device.

    Attributes
    ----------
    buffer : Tensor
        (2 * layers, B, G, C, D), keys and values of each layer in turn.
    lengths : list of int
        Stored tokens of each row; 0 in an idle one.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        columns: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        columns = round_up(columns)
        # zeros, as hidden columns are multiplied by 0
        self.buffer = torch.zeros(
            2 * layers, rows, heads, columns, size, dtype=dtype, device=device
        )
        self.lengths = [0] * rows
        layer: Any
        self.layers = [DynamicLayer() for _ in range(layers)]
        for layer in self.layers:
            layer.dtype, layer.device, layer.is_initialized = dtype, device, True
        self.arrange()

    @property
    def rows(self) -> int:
        """B."""
        return int(self.buffer.shape[1])

    @property
    def columns(self) -> int:
        """C."""
        return int(self.buffer.shape[3])

    @property
    def width(self) -> int:
        """Columns of the next step, its own token's included."""
        return round_up(max(self.lengths) + 1)

    def fill(self, row: int, keys: list[Tensor], values: list[Tensor]) -> None:
        """Store a conversation in a row: per layer (1, G, T, D), with T + 1 at most C."""
        length = keys[0].shape[2]
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.buffer[2 * index, row, :, :length].copy_(key[0])
            self.buffer[2 * index + 1, row, :, :length].copy_(value[0])
        self.lengths[row] = length
        self.arrange()

    def resize(self, rows: list[int | None], columns: int) -> SlotCache:
        """A new cache with these rows of this one, None for an idle one, and room for columns."""
        layers, _, heads, _, size = self.buffer.shape
        new = SlotCache(
            layers // 2, len(rows), heads, columns, size, self.buffer.dtype, self.buffer.device
        )
        for here, there in enumerate(rows):
            length = 0 if there is None else self.lengths[there]
            new.lengths[here] = length
            if length:
                new.buffer[:, here, :, :length].copy_(self.buffer[:, there, :, :length])
        new.arrange()
        return new

    def arrange(self) -> None:
        """Show the layers the columns in front of the next step's token."""
        views = self.buffer.narrow(3, 0, min(self.width, self.columns) - 1).unbind(0)
        layer: Any
        for layer, keys, values in zip(self.layers, views[::2], views[1::2], strict=True):
            layer.keys, layer.values = keys, values
        memory = pruned_prompt_of(self)
        if memory is not None:
            memory.note(self)

    def mask(self) -> Tensor:
        """(B, width) long, 1 on each row's tokens and on the next one's column."""
        lengths = torch.tensor(self.lengths, device=self.buffer.device)
        columns = torch.arange(self.width, device=self.buffer.device)
        mask = columns < lengths[:, None]
        mask[:, -1] = True
        return mask.long()

    def settle(self, rows: list[int]) -> None:
        """Move the step's token of these rows behind their other tokens; drop that of others."""
        last, here = self.width - 1, torch.tensor(rows, device=self.buffer.device)
        ends = torch.tensor([self.lengths[row] for row in rows], device=self.buffer.device)
        layer: Any
        for index, layer in enumerate(self.layers):
            if layer.keys.data_ptr() == self.buffer[2 * index].data_ptr():
                continue  # the step wrote into the buffer
            self.buffer[2 * index, :, :, last].copy_(layer.keys[:, :, last])
            self.buffer[2 * index + 1, :, :, last].copy_(layer.values[:, :, last])
        self.buffer[:, here, :, ends] = (
            self.buffer[:, :, :, last].index_select(1, here).transpose(0, 1)
        )
        for row in rows:
            self.lengths[row] += 1
        self.arrange()


def round_up(columns: int) -> int:
    """The next multiple of `STRIDE`."""
    return -(-columns // STRIDE) * STRIDE
