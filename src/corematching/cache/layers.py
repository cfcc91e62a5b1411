"""Shortens KV caches in the prefill, and fits attention masks to shortened caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from corematching import devices
from corematching.cache.masks import take
from corematching.cache.pruned_cache import PrunedCache, pruned_prompt_of
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.errors import InputError, UnsupportedModelError

DYNAMIC_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
GATHERED_BYTES = 1 << 28
"""Keys and values that are copied to be gathered together, at most."""
STATIC_LAYERS = (StaticLayer, StaticSlidingWindowLayer)


def is_fresh(cache: Any, query_length: int) -> bool:
    """Whether a forward with this cache is a prefill; never synchronizes in decode steps."""
    if cache is None or not cache.layers or not any(x.is_initialized for x in cache.layers):
        return True
    stored = cache.get_query_offset()
    if isinstance(stored, Tensor):
        return query_length > 1 and int(stored) == 0
    return stored == 0


def check_cache(cache: Any) -> None:
    """Refuse caches whose layers cannot be shortened.

    Raises
    ------
    UnsupportedModelError
        The cache is quantised or off-loaded, or neither a DynamicCache nor a StaticCache.
    """
    if cache is None:
        return
    name = type(cache).__name__
    known = isinstance(cache, (DynamicCache, StaticCache))
    layers = {type(layer) for layer in cache.layers}
    if not known or layers - set(DYNAMIC_LAYERS) - set(STATIC_LAYERS):
        odd = ", ".join(sorted(x.__name__ for x in layers - {*DYNAMIC_LAYERS, *STATIC_LAYERS}))
        raise UnsupportedModelError(
            f"a {name}{f' with {odd}' if odd else ''} cannot be shortened: "
            "use a DynamicCache or a StaticCache (cache_implementation=None or 'static')"
        )
    if cache.offloading:
        raise UnsupportedModelError(
            f"an off-loaded {name} cannot be shortened: leave cache_implementation at None or "
            "'static'; what is left after dropping tokens is small"
        )


def widen_sliding_layers(cache: Any, length: int, capacity: int | None = None) -> None:
    """Replace sliding-window layers with fewer slots than ``length`` by full layers.

    A full sliding layer would evict tokens before the policy chooses. After the prefill, a window
    counts present tokens only.

    Parameters
    ----------
    cache : Cache
        An empty cache.
    length : int
        Tokens stored before any is dropped.
    capacity : int or None
        Slots of static layers in a cache without a full layer.

    Raises
    ------
    UnsupportedModelError
        A static cache has sliding layers only, so its full length is unknown.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and length >= layer.sliding_window:
            cache.layers[index] = DynamicLayer()
        elif type(layer) is StaticSlidingWindowLayer and length > layer.max_cache_len:
            full = [x.max_cache_len for x in cache.layers if type(x) is StaticLayer]
            slots = max(full, default=capacity or 0)
            if slots < length:
                raise UnsupportedModelError(
                    f"this StaticCache's sliding windows hold {layer.max_cache_len} of the "
                    f"prompt's {length} tokens: use a DynamicCache, or let generate() make the "
                    "cache (cache_implementation='static')"
                )
            cache.layers[index] = StaticLayer(max_cache_len=slots)


def store(cache: Any, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """``cache.update`` without the copy that an empty dynamic layer makes.

    Parameters
    ----------
    cache : Cache
        The cache.
    key, value : Tensor
        (B, G, T, D) each; the cache may keep these very tensors.
    index : int
        The layer.

    Returns
    -------
    keys, values : Tensor
        (B, G, S, D) each, all keys and values of the layer.
    """
    if not stores_as_given(cache, index):
        keys, values = cache.update(key, value, index)
        return keys, values
    layer = cache.layers[index]
    layer.dtype, layer.device = key.dtype, key.device
    layer.keys, layer.values, layer.is_initialized = key, value, True
    return key, value


def stores_as_given(cache: Any, index: int) -> bool:
    """Whether `store` returns the given keys and values themselves for this layer."""
    kind: Any = type(cache)
    if issubclass(kind, PrunedCache):
        kind = kind.__bases__[1]
    if kind.update is not Cache.update or cache.offloading or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    return type(layer) is DynamicLayer and not layer.is_initialized


def compact(cache: Any, layers: int, order: Tensor) -> None:
    """Keep only the tokens in ``order`` (B, K) in the first ``layers`` layers."""
    if cache is None:
        return
    count = order.shape[1]
    layer: Any
    shortened = cache.layers[:layers]
    every = [x for layer in shortened for x in (layer.keys, layer.values)]
    static = any(layer.is_compileable for layer in shortened)  # most of it is empty
    tensors = [take(x, order, 0, 2) for x in every] if static else take_all(every, order)
    for layer, keys, values in zip(shortened, tensors[::2], tensors[1::2], strict=True):
        if layer.is_compileable:
            layer.keys[:, :, :count].copy_(keys)
            layer.values[:, :, :count].copy_(values)
            layer.cumulative_length.fill_(count)
            if isinstance(layer, StaticSlidingWindowLayer):
                layer.cumulative_length_int = count
        else:
            layer.keys, layer.values = keys, values
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = count


def take_all(tensors: Sequence[Tensor], order: Tensor) -> list[Tensor]:
    """Gather ``order`` (B, K) from tensors (B, G, T, D), for each the tokens of dimension 2.

    On a GPU tensors of one shape are gathered together, with two launches instead of one for each.
    """
    if devices.on_host(order):
        return [take(x, order, 0, 2) for x in tensors]
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[list[int]]] = {}
    for index, x in enumerate(tensors):
        most = max(1, GATHERED_BYTES // max(x.numel() * x.element_size(), 1))
        group = groups.setdefault((x.shape, x.dtype, x.device), [[]])
        if len(group[-1]) == most:
            group.append([])
        group[-1].append(index)
    for part in (part for parts in groups.values() for part in parts):
        gathered = take(torch.stack([tensors[i] for i in part], 1), order, 0, 3)
        found.update(zip(part, gathered.unbind(1), strict=True))
    return [found[index] for index in range(len(tensors))]


def tokens_after(cache: Any, query_length: int) -> int:
    """Tokens of the conversation after the next forward, dropped ones included.

    An upper bound for a static cache, which counts on the device.
    """
    seen = cache.get_seq_length()
    if isinstance(seen, Tensor):
        pruned = cache.pruned_prompt
        return pruned.prompt - pruned.valid.shape[1] + cache.get_max_length()
    return seen + query_length


def short_mask(pruned: PrunedPrompt, mask: Tensor | None, total: int) -> Tensor | None:
    """The 2D mask over the stored tokens, from one over the ``total`` tokens of the conversation.

    Returns None where ``mask`` is None and there is no padding.

    Raises
    ------
    InputError
        The mask has another number of rows than the cache.
    """
    rest = total - pruned.prompt
    batch = pruned.valid.shape[0]
    if mask is None:
        if not pruned.filler:
            return None
        mask = pruned.valid.new_ones(batch, total, dtype=torch.long)
    if mask.shape[0] != batch:
        raise InputError(
            f"an attention mask of {mask.shape[0]} rows does not fit a cache of {batch}: take the "
            "rows of the mask that the cache has"
        )
    valid = pruned.valid.to(mask)
    return valid if rest <= 0 else torch.cat([valid, mask[:, -rest:]], dim=1)


def fit_mask(kwargs: dict[str, Any], cache: Cache | None, length: int) -> dict[str, Any]:
    """Fit a caller's mask over the whole conversation, or None, to the stored tokens.

    Raises
    ------
    InputError
        The mask has another number of rows than the cache, or too few columns.
    """
    pruned, mask = pruned_prompt_of(cache), kwargs.get("attention_mask")
    if pruned is None or not pruned.shortened or isinstance(mask, dict):
        return kwargs
    if mask is None and pruned.filler:
        total = tokens_after(cache, length)
    elif mask is not None and mask.ndim == 2:
        total = mask.shape[1]
        _check_columns(total, cache, length)
    else:
        return kwargs
    return dict(kwargs, attention_mask=short_mask(pruned, mask, total))


def _check_columns(columns: int, cache: Any, length: int) -> None:
    """Check that a mask spans a dynamic cache and the new tokens."""
    seen = cache.get_seq_length()
    if isinstance(seen, int) and columns < seen + length:
        raise InputError(
            f"an attention mask of {columns} columns does not fit a conversation of {seen} tokens "
            f"and {length} new ones: it counts dropped tokens as well, as cache.get_seq_length() "
            "does"
        )
