"""Key-value caches that remember how many tokens were dropped from them.

A cache that went through a prefill of ours keeps its object and its layers, and gets a subclass of
its own class: ``get_seq_length`` still counts the dropped tokens, so positions and the slicing of
later inputs stay right, while ``get_query_offset``, which masks ask, counts the stored ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from corematching.errors import UnsupportedModelError
from corematching.protocol import NeuronChoice

from .masks import take

DYNAMIC_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
STATIC_LAYERS = (StaticLayer, StaticSlidingWindowLayer)


@dataclass
class Memory:
    """What a cache keeps of the prefill that filled it.

    Attributes
    ----------
    valid : Tensor
        (B, K) bool, which of the stored prompt tokens are neither filler nor padding.
    prompt : int
        T, tokens of the prompt before any was dropped, padding included.
    dropped : int or Tensor
        T - K; a tensor in static caches, so that compiled code does not depend on its value.
    neurons : dict
        The layers' neuron choices, by layer.
    shortened : bool
        Whether a token policy was at work; if not, masks are as the caller made them.
    record : int
        The number of the prefill's record.
    filler : bool
        Whether any is False in ``valid``.
    logarithms : Tensor or None
        (B, K) float32, of the tokens' weights in attention; zeros behind in a static cache, up to
        its length. None: each counts for itself.
    masks : tuple or None
        The latest mask to which they were added: what it was made of, and the result.
    """

    valid: Tensor
    prompt: int
    dropped: int | Tensor
    neurons: dict[int, NeuronChoice] = field(default_factory=dict)
    shortened: bool = True
    record: int = -1
    filler: bool = False
    logarithms: Tensor | None = None
    masks: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        self.filler = not bool(self.valid.all())


class RememberingCache(Cache):
    """What `remember` mixes into a cache's class."""

    memory: Memory

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, dropped ones included; the position of the next token."""
        return super().get_seq_length(layer_idx) + self.memory.dropped

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens stored."""
        return super().get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget the tokens and what was dropped."""
        super().reset()
        memory = self.memory
        if isinstance(memory.dropped, Tensor):
            memory.dropped.zero_()
        else:
            memory.dropped = 0
        memory.neurons, memory.logarithms, memory.masks = {}, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rearrange(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._rearrange(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the samples."""
        super().batch_select_indices(indices)
        self._rearrange(lambda x: x[indices])

    def _rearrange(self, move: Any) -> None:
        memory = self.memory
        memory.valid, memory.masks = move(memory.valid), None
        if memory.logarithms is not None:
            memory.logarithms = move(memory.logarithms)
        memory.neurons = {
            layer: _move_choice(choice, move) for layer, choice in memory.neurons.items()
        }


def _move_choice(choice: NeuronChoice, move: Any) -> NeuronChoice:
    moved: dict[str, Any] = {
        name: None if part is None else move(part) for name, part in vars(choice.settle()).items()
    }
    return NeuronChoice(**moved)


@functools.cache
def _remembering(kind: type) -> type:
    return type(f"Remembering{kind.__name__}", (RememberingCache, kind), {})


def remember(cache: Cache, memory: Memory) -> None:
    """Let ``cache`` answer for the tokens that were dropped from it."""
    if cache.is_compileable:
        first: Any = cache.layers[0]
        dropped = torch.full((), int(memory.dropped), dtype=torch.long, device=first.keys.device)
        torch._dynamo.mark_static_address(dropped)
        memory.dropped = dropped
        if memory.logarithms is not None:
            memory.logarithms = _fix_length(memory.logarithms, cache)
    cache.memory = memory  # type: ignore[attr-defined]
    if not isinstance(cache, RememberingCache):
        kind: Any = type(cache)
        cache.__class__ = _remembering(kind)


def _fix_length(logarithms: Tensor, cache: Any) -> Tensor:
    """(B, K) to (B, slots of a static cache), at an address that compiled code may rely on."""
    slots = max(layer.max_cache_len for layer in cache.layers)
    fixed = F.pad(logarithms, (0, max(slots - logarithms.shape[1], 0)))
    torch._dynamo.mark_static_address(fixed)
    return fixed


def memory_of(cache: Any) -> Memory | None:
    """What ``cache`` keeps of a prefill of ours, or None."""
    return cache.memory if isinstance(cache, RememberingCache) else None


def logarithms_of(cache: Any) -> Tensor | None:
    """(B, K) float32, contiguous: what is added to scores of the cache's first columns, or None."""
    memory = memory_of(cache)
    return None if memory is None or memory.logarithms is None else memory.logarithms.contiguous()


def is_fresh(cache: Any, query_length: int) -> bool:
    """Whether a forward with this cache is a prefill; asks no device while decoding."""
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
        The cache is quantised, off-loaded, or no DynamicCache or StaticCache at all.
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
    """Give sliding-window layers that ``length`` tokens would overflow room for all of them.

    A full sliding layer has evicted tokens by the time some are chosen. After the prefill a window
    counts the tokens that are still present.

    Parameters
    ----------
    cache : Cache
        An empty cache.
    length : int
        Tokens that will be stored before any is dropped.
    capacity : int or None
        Slots for static layers, where the cache has no full layer to take the number from.

    Raises
    ------
    UnsupportedModelError
        A static cache has sliding layers only, so their full length is not known.
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
    """What ``cache.update`` gives and does; the cache may keep these very keys and values.

    An empty dynamic layer would copy them.

    Parameters
    ----------
    cache : Cache
    key, value : Tensor
        (B, G, T, D), in memory that nobody else writes to.
    index : int
        The layer.
    """
    if not takes_as_is(cache, index):
        keys, values = cache.update(key, value, index)
        return keys, values
    layer = cache.layers[index]
    layer.dtype, layer.device = key.dtype, key.device
    layer.keys, layer.values, layer.is_initialized = key, value, True
    return key, value


def takes_as_is(cache: Any, index: int) -> bool:
    """Whether `store` gives back the very keys and values that it gets for this layer."""
    if type(cache).update is not Cache.update or cache.offloading or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    return type(layer) is DynamicLayer and not layer.is_initialized


def compact(cache: Any, layers: int, order: Tensor) -> None:
    """Keep only the tokens in ``order`` (B, K) in the first ``layers`` layers."""
    if cache is None:
        return
    count = order.shape[1]
    layer: Any
    for layer in cache.layers[:layers]:
        keys, values = take(layer.keys, order, 0, 2), take(layer.values, order, 0, 2)
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


def tokens_after(cache: Any, query_length: int) -> int:
    """Tokens of the conversation after the next forward, dropped ones included.

    An upper bound where a static cache counts on the device.
    """
    seen = cache.get_seq_length()
    if isinstance(seen, Tensor):
        memory = cache.memory
        return memory.prompt - memory.valid.shape[1] + cache.get_max_length()
    return seen + query_length


def short_mask(memory: Memory, mask: Tensor | None, total: int) -> Tensor | None:
    """The 2D mask over what is stored, from one over the ``total`` tokens of the conversation.

    Returns None where nothing is padding and ``mask`` is None.
    """
    rest = total - memory.prompt
    if mask is None:
        if not memory.filler:
            return None
        mask = memory.valid.new_ones(memory.valid.shape[0], total, dtype=torch.long)
    valid = memory.valid.to(mask)
    return valid if rest <= 0 else torch.cat([valid, mask[:, -rest:]], dim=1)


def fit_mask(kwargs: dict[str, Any], cache: Cache | None, length: int) -> dict[str, Any]:
    """A caller's mask over the whole conversation, or none, made to fit what is stored."""
    memory, mask = memory_of(cache), kwargs.get("attention_mask")
    if memory is None or not memory.shortened or isinstance(mask, dict):
        return kwargs
    if mask is None and memory.filler:
        total = tokens_after(cache, length)
    elif mask is not None and mask.ndim == 2:
        total = mask.shape[1]
    else:
        return kwargs
    return dict(kwargs, attention_mask=short_mask(memory, mask, total))
