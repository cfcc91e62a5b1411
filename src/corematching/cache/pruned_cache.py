"""Caches that count dropped tokens and carry the choices of their prompt.

After a pruned prefill, a cache keeps its identity and its layers, and its class becomes a subclass
of its own class. ``get_seq_length`` counts dropped tokens too, for positions and for the slicing of
later inputs; ``get_query_offset`` counts stored tokens, for masks. The cache's own operations
(reorder, select, repeat, crop, reset) update these choices; after a replacement of its keys, the
rows are identified by their content.
Shapes: B rows, K stored tokens of the prompt.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.errors import ConfigError, InputError, UnsupportedModelError


class PrunedCache(Cache):
    """The mixin that `remember` adds to a cache's class."""

    pruned_prompt: PrunedPrompt

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, dropped ones included; the position of the next token."""
        stored = super().get_seq_length(layer_idx)
        is_empty = isinstance(stored, int) and not stored
        return stored if is_empty else stored + self.pruned_prompt.dropped

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens stored."""
        return super().get_seq_length(layer_idx)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values."""
        pruned = self.pruned_prompt
        if layer_idx != pruned.layer:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        known = layer.keys is pruned.shown
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if known:
            pruned.note(self)
        return out

    def __iter__(self) -> Any:
        """Iterate over keys and values, unless choices would be lost.

        Raises
        ------
        UnsupportedModelError
            Tokens were dropped, or neurons chosen.
        """
        if not self.pruned_prompt.is_blank:
            raise UnsupportedModelError(
                "keys and values alone do not say which tokens were dropped and which neurons "
                "chosen: use copy.deepcopy(cache) for a copy, and cache.layers[i].keys to read"
            )
        return super().__iter__()  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[1], dict(vars(self)))

    def reset(self) -> None:
        """Forget the tokens and what was dropped."""
        super().reset()
        self.pruned_prompt.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples, as beam search does.

        Raises
        ------
        InputError
            A row does not exist.
        """
        rows = self._find_rows(beam_idx)
        super().reorder_cache(rows)  # type: ignore[arg-type]
        self._follow(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample.

        Raises
        ------
        ConfigError
            ``repeats`` is no positive number, or not one for each sample.
        UnsupportedModelError
            The cache is static.
        """
        self._check_not_static("batch_repeat_interleave")
        rows, counts = self._find_rows(slice(None)), torch.as_tensor(repeats).cpu()
        fits = counts.ndim == 0 or counts.shape == rows.shape
        if not fits or counts.is_floating_point() or bool((counts < 1).any()):
            raise ConfigError(
                f"repeats={repeats}: give a positive number, or one for each of the cache's "
                f"{len(rows)} rows"
            )
        rows = rows.repeat_interleave(counts)
        super().batch_select_indices(rows)
        self._follow(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the samples.

        Raises
        ------
        InputError
            A row does not exist, or none is selected.
        UnsupportedModelError
            The cache is static.
        """
        self._check_not_static("batch_select_indices")
        rows = self._find_rows(indices)
        super().batch_select_indices(rows)
        self._follow(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens.

        Parameters
        ----------
        tokens_to_remove : int
            Their number, negated.

        Raises
        ------
        ConfigError
            The number is positive.
        InputError
            They include a part of the prompt from which tokens were dropped.
        UnsupportedModelError
            The cache is static, or a sliding window has evicted tokens that would be visible again.
        """
        self._check_crop(tokens_to_remove)
        pruned, count = follow(self), -tokens_to_remove
        if pruned is None:
            super().crop(tokens_to_remove)
            return
        stored, columns = int(self.get_query_offset()), pruned.valid.shape[1]
        if count >= int(self.get_seq_length()):
            self.reset()
            return
        inside = max(columns - (stored - count), 0)
        if inside >= columns or inside > pruned.count_whole():
            raise InputError(
                f"crop({tokens_to_remove}) reaches into a part of the prompt from which tokens "
                "were dropped, so it would remove others: crop less, or read the prompt again"
            )
        super().crop(tokens_to_remove)
        if inside:
            pruned.cut(inside)
            pruned.watch(self)
        pruned.note(self)

    def _check_crop(self, tokens_to_remove: int) -> None:
        self._check_not_static("crop")
        if tokens_to_remove > 0:
            raise ConfigError(
                f"crop({tokens_to_remove}): give the number of tokens to take back, with a minus"
            )
        for layer in self.layers:
            full = getattr(layer, "cumulative_length", 0) >= getattr(layer, "sliding_window", 1)
            if full and not getattr(layer, "record_past", False):
                raise UnsupportedModelError(
                    "a sliding window has evicted tokens that would be visible again: call "
                    "cache.activate_past_recording() before the tokens that you may crop"
                )

    def _check_not_static(self, operation: str) -> None:
        if any(layer.is_compileable for layer in self.layers):
            raise UnsupportedModelError(
                f"{operation}() changes the shape of a cache, which a static one cannot: use a "
                "DynamicCache"
            )

    def _find_rows(self, indices: Any) -> Tensor:
        """(B',) long on the CPU, the rows that an index selects."""
        follow(self)
        every = torch.arange(_count_rows(self))
        indices = indices.cpu() if isinstance(indices, Tensor) else indices
        try:
            rows = every[indices]
        except (IndexError, TypeError) as error:
            raise InputError(f"the cache has {len(every)} rows: {error}") from None
        if rows.ndim != 1 or not len(rows):
            raise InputError(
                f"a selection of shape {tuple(rows.shape)} is none of the cache's {len(every)} "
                "rows: name at least one row, in a list or a tensor of one dimension"
            )
        return rows

    def _follow(self, rows: Tensor) -> None:
        if not self.pruned_prompt.is_blank:
            self.pruned_prompt.rearrange(rows)
            self.pruned_prompt.note(self)


@functools.cache
def _pruned_kind(kind: type) -> type:
    return type(f"Pruned{kind.__name__}", (PrunedCache, kind), {})


def _rebuild(kind: type, state: dict[str, Any]) -> Cache:
    """Rebuild a pruned cache of class ``kind`` for copy and pickle."""
    made: Any = _pruned_kind(kind)
    cache: Cache = made.__new__(made)
    vars(cache).update(state)
    return cache


def remember(cache: Cache, pruned: PrunedPrompt) -> None:
    """Turn ``cache`` into a `PrunedCache` of this prompt."""
    if cache.is_compileable:
        first: Any = cache.layers[0]
        dropped = torch.full((), int(pruned.dropped), dtype=torch.long, device=first.keys.device)
        torch._dynamo.mark_static_address(dropped)
        pruned.dropped = dropped
        if pruned.log_counts is not None:
            pruned.log_counts = _fix_length(pruned.log_counts, cache)
    pruned.watch(cache)
    cache.pruned_prompt = pruned  # type: ignore[attr-defined]
    if not isinstance(cache, PrunedCache):
        kind: Any = type(cache)
        cache.__class__ = _pruned_kind(kind)


def _fix_length(log_counts: Tensor, cache: Any) -> Tensor:
    """(B, K) padded to (B, slots of a static cache), at a static address for compiled code."""
    slots = max(layer.max_cache_len for layer in cache.layers)
    fixed = F.pad(log_counts, (0, max(slots - log_counts.shape[1], 0)))
    torch._dynamo.mark_static_address(fixed)
    return fixed


def pruned_prompt_of(cache: Any) -> PrunedPrompt | None:
    """The prompt of ``cache``, or None if it is no `PrunedCache`."""
    return cache.pruned_prompt if isinstance(cache, PrunedCache) else None


def log_counts_of(cache: Any, batch: int) -> Tensor | None:
    """The bias for the scores of the cache's first columns, (B, K) float32, contiguous, or None.

    Raises
    ------
    InputError
        The cache has another number of rows than ``batch``.
    """
    pruned = pruned_prompt_of(cache)
    if pruned is None or pruned.log_counts is None:
        return None
    pruned.check_batch(batch)
    return pruned.log_counts.contiguous()


def follow(cache: Any, batch: int | None = None) -> PrunedPrompt | None:
    """A cache's prompt, updated for replaced keys; None where nothing was chosen for it.

    Parameters
    ----------
    cache : Any
        The model's ``past_key_values``.
    batch : int or None
        Rows of the next tokens; None skips the check.

    Raises
    ------
    InputError
        The keys belong to other prompts, or to another number of rows than ``batch``.
    """
    pruned = pruned_prompt_of(cache)
    if pruned is None or pruned.is_blank:
        return None
    if pruned.layer < 0:
        if _count_rows(cache) != pruned.batch:
            raise _unknown_rows(pruned, _count_rows(cache))
    elif cache.layers[pruned.layer].keys is not pruned.shown:
        _follow_keys(cache, pruned)
    if batch is not None:
        pruned.check_batch(batch)
    return pruned


def _follow_keys(cache: Any, pruned: PrunedPrompt) -> None:
    """Find the prompt of each row after keys were replaced, by its last token's keys."""
    layer, count, sign = cache.layers[pruned.layer], pruned.valid.shape[1], pruned.sign
    keys: Any = layer.keys
    assert sign is not None
    full: list[Any] = [x.keys for x in cache.layers if type(x) is DynamicLayer and x.is_initialized]
    sizes = {(x.shape[0], x.shape[-2]) for x in full}
    if keys is None or len(sizes) != 1 or keys.shape[-2] < count:
        raise _unknown_rows(pruned, _count_rows(cache))
    one = len(sign) == len(keys) == 1 and pruned.log_counts is None and not pruned.filler
    here = keys[:, :, count - 1 : count].squeeze(2).to(sign.device)
    if not one and (here.shape != sign.shape or not torch.equal(here, sign)):
        if here.shape[1:] != sign.shape[1:]:
            raise _unknown_rows(pruned, len(keys))
        match = (here[:, None] == sign[None]).flatten(2).all(-1)
        if not bool(match.any(1).all()):
            raise _unknown_rows(pruned, len(keys))
        pruned.rearrange(match.long().argmax(1).cpu())
    pruned.note(cache)


def _unknown_rows(pruned: PrunedPrompt, rows: int) -> InputError:
    return InputError(
        f"the cache's keys were replaced by others of {rows} rows, and which of its "
        f"{pruned.batch} prompts or which of their columns these are cannot be told: use "
        "cache.batch_select_indices(), batch_repeat_interleave(), reorder_cache() and crop()"
    )


def _count_rows(cache: Any) -> int:
    """Rows of a cache; 0 where it is empty."""
    every = (layer.keys for layer in cache.layers if layer.is_initialized)
    return next((keys.shape[0] for keys in every if keys is not None), 0)
