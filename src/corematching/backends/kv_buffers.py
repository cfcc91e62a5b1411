"""Growable buffers for the keys and values of an ordinary DynamicCache."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.cache.slots import SlotCache

LEAST_ROOM = 64
CPU = torch.device("cpu")


class CacheBuffers:
    """Buffers in which decode steps append keys and values without copying the stored ones.

    A cache's layers keep their public ``keys`` and ``values``, as slices of one buffer. If other
    code replaces them (beams, a crop), they are copied into a new buffer.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
        The decoder's shape.
    dtype : torch.dtype
        The dtype of keys and values.
    device : torch.device
        Their device.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.layers, self.kv_heads, self.head_dim, self.dtype = layers, kv_heads, head_dim, dtype
        self.device = device
        self._own: weakref.WeakKeyDictionary[Any, tuple[Tensor, tuple[Tensor, ...]]]
        self._own = weakref.WeakKeyDictionary()

    def stored(self, cache: Any, batch: int) -> int | None:
        """Tokens stored in the cache; None where the cache cannot be buffered."""
        own = self._own.get(cache)
        if own is not None and _are_shown(cache, own[1]):
            return own[1][0].shape[2] if own[1][0].shape[0] == batch else None
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            return None
        if len(cache.layers) != self.layers:
            return None
        layer: Any
        shapes = set()
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                return None
            tensor: Any
            for tensor in (layer.keys, layer.values):
                if tensor.dtype != self.dtype or tensor.device != self.device or tensor.ndim != 4:
                    return None
                shapes.add(tuple(tensor.shape))
        if len(shapes) != 1:
            return None
        rows, heads, length, size = shapes.pop()
        fits = (rows, heads, size) == (batch, self.kv_heads, self.head_dim)
        return length if fits and length else None

    def take(self, cache: Any, stored: int, batch: int) -> Tensor:
        """A buffer (2 * layers, B, kv_heads, capacity, head_dim) with room for one more token.

        A `SlotCache` has its own.
        """
        if isinstance(cache, SlotCache) and stored < cache.columns:
            return cache.buffer
        own = self._own.get(cache)
        if own is not None and _are_shown(cache, own[1]) and stored < own[0].shape[3]:
            return own[0]
        with torch.inference_mode(False), torch.no_grad():
            buffer = self.make(batch, stored + max(LEAST_ROOM, stored // 4))
            self.fill(buffer, cache, stored)
        return buffer

    def make(self, batch: int, capacity: int) -> Tensor:
        """An uninitialized buffer (2 * layers, B, kv_heads, capacity, head_dim)."""
        return torch.empty(
            (2 * self.layers, batch, self.kv_heads, capacity, self.head_dim),
            dtype=self.dtype,
            device=self.device,
        )

    def fill(self, buffer: Tensor, cache: Any, stored: int) -> None:
        """Copy a cache's keys and values into a buffer."""
        for index, layer in enumerate(cache.layers):
            buffer[2 * index, :, :, :stored].copy_(layer.keys.detach())
            buffer[2 * index + 1, :, :, :stored].copy_(layer.values.detach())

    def forget(self, cache: Any) -> None:
        """Drop the buffer of a cache with replaced keys or values."""
        self._own.pop(cache, None)

    def is_shown(self, cache: Any, buffer: Tensor) -> bool:
        """Whether a cache's layers still are slices of this buffer, as `show` set them."""
        own = self._own.get(cache)
        return own is not None and own[0] is buffer and _are_shown(cache, own[1])

    def show(self, cache: Any, buffer: Tensor, length: int) -> None:
        """Make the cache's layers slices of the buffer's first ``length`` tokens."""
        with torch.inference_mode(False), torch.no_grad():
            views = buffer.narrow(3, 0, length).unbind(0)
        for layer, keys, values in zip(cache.layers, views[::2], views[1::2], strict=True):
            layer.keys, layer.values = keys, values
        self._own[cache] = buffer, views
        memory = pruned_prompt_of(cache)
        if memory is not None:
            memory.note(cache)


def _are_shown(cache: Any, views: tuple[Tensor, ...]) -> bool:
    """Whether a cache's layers still have these views."""
    layers = cache.layers
    return len(layers) * 2 == len(views) and all(
        layer.keys is keys and layer.values is values
        for layer, keys, values in zip(layers, views[::2], views[1::2], strict=True)
    )
