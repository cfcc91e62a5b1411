"""Shortens what a decoder hands to its layers, after tokens were dropped.

Shapes: B samples, T tokens of the prompt, K tokens still present, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from corematching.cache.masks import take
from corematching.errors import ALL_TOKENS, UnsupportedModelError
from corematching.model.layer_inputs import PER_TOKEN, list_odd_inputs
from corematching.model.spec import ModelSpec
from corematching.runtime.prefill.left import shorten


@dataclass(frozen=True)
class Present:
    """The tokens that are still present.

    Attributes
    ----------
    origin : Tensor
        (B, K) long, their columns in the whole prompt.
    valid : Tensor
        (B, K) bool, False on padding and filler.
    full : bool or None
        Whether ``valid`` is True everywhere; None: it is read.
    log_counts : Tensor or None
        (B, K) float32, the logarithms of the prompt tokens that each counts for; None: one each.
    """

    origin: Tensor
    valid: Tensor
    full: bool | None = None
    log_counts: Tensor | None = None


class LayerInputs:
    """Gathers a layer's inputs for the present tokens; equal inputs of several layers once.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    length : int
        T, tokens of the prompt.
    """

    def __init__(self, parts: ModelSpec, length: int) -> None:
        self.parts, self.length = parts, length
        self._memo: dict[tuple[int, int], tuple[Any, Any]] = {}

    def forget(self) -> None:
        """Release the gathered tensors, when others are present."""
        self._memo.clear()

    def shorten(
        self, index: int, hidden: Tensor, kwargs: Mapping[str, Any], present: Present, cache: Any
    ) -> dict[str, Any]:
        """The inputs of layer ``index`` beside its hidden states (B, K, d), by name.

        Raises
        ------
        UnsupportedModelError
            An input of unknown meaning has an entry per token of the prompt.
        """
        self._refuse_odd(index, kwargs)
        short = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            short["position_ids"] = self._positions(kwargs["position_ids"], present)
        if "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
            short["attention_mask"] = self._mask(index, mask, hidden, present, cache)
        if kwargs.get("position_embeddings") is not None:
            short["position_embeddings"] = self._rotations(kwargs["position_embeddings"], present)
        for name in PER_TOKEN & kwargs.keys():
            if kwargs[name] is not None:
                short[name] = take(kwargs[name], present.origin)
        return short

    def _refuse_odd(self, index: int, kwargs: Mapping[str, Any]) -> None:
        layer = self.parts.layers[index]
        for name in list_odd_inputs(layer, self.parts.attentions[index]) & kwargs.keys():
            value = kwargs[name]
            if isinstance(value, Tensor) and self.length in value.shape:
                raise UnsupportedModelError(
                    f"{type(layer).__name__} takes '{name}' with an entry for every token of the "
                    f"prompt, which cannot be shortened: {ALL_TOKENS}"
                )

    def _positions(self, positions: Tensor, present: Present) -> Tensor | None:
        """Gather position ids, (..., B or 1, T).

        FlashAttention gets None: it would take gaps between positions for several prompts.
        """
        if "flash" in (self.parts.config._attn_implementation or ""):
            return None
        key = (id(positions), -2)
        if key not in self._memo:
            self._memo[key] = (positions, take(positions, present.origin, -2, -1))
        return self._memo[key][1]

    def _mask(self, index: int, mask: Any, hidden: Tensor, present: Present, cache: Any) -> Any:
        valid = present.valid
        count = stored = valid.shape[1]
        if cache is not None:
            stored = cache.layers[index].get_mask_sizes(count)[0]
        key = (id(mask), stored)
        if key not in self._memo:
            full = bool(valid.all()) if present.full is None else present.full
            causal = getattr(self.parts.attentions[index], "is_causal", True)
            how = causal, self.parts.config._attn_implementation, hidden.dtype
            kept = present.origin, valid, full, present.log_counts
            self._memo[key] = (mask, shorten(mask, kept, stored, how))
        return self._memo[key][1]

    def _rotations(self, rotations: Any, present: Present) -> Any:
        """Gather cosines and sines, (..., B or 1, T, D) each."""
        pair = rotations if isinstance(rotations, tuple) else (rotations,)
        key = (id(pair[0]), -1)
        if key not in self._memo:
            short = tuple(take(x, present.origin, -3, -2) for x in pair)
            self._memo[key] = (pair, short)
        short = self._memo[key][1]
        return short if isinstance(rotations, tuple) else short[0]
