"""The tokens that a cut leaves, and the attention masks of the layers behind it.

Shapes: B samples, T tokens before the cut, K tokens after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.selection import Survivors, line_up
from corematching.cache.masks import shorten_mask, survivors, take, weigh_mask
from corematching.model.spec import ModelSpec


def find_survivors(
    keep: Tensor,
    valid: Tensor,
    image: Tensor,
    origin: Tensor,
    weights: Tensor | None,
    most: int | None,
) -> Survivors:
    """The tokens after a cut that keeps ``keep`` and all text.

    Parameters
    ----------
    keep, valid, image : Tensor
        (B, T) bool, what a policy keeps, tokens that are no padding, and image tokens.
    origin : Tensor
        (B, T) long, the tokens' columns in the whole prompt.
    weights : Tensor or None
        (B, T) float, the number of prompt tokens that each one represents.
    most : int or None
        K; None: this waits for the device.
    """
    if most is not None and not devices.on_host(keep):
        found = line_up(keep, valid, image, origin, weights, most)
        if found is not None:
            return found
    keep = (keep & valid) | (valid & ~image)
    order, present = survivors(keep, most)
    weights = None if weights is None else weights.gather(1, order)
    image, origin = image.gather(1, order) & present, origin.gather(1, order)
    return Survivors(keep, order, present, image, origin, weights, None)


class ShortInputs:
    """The masks and rotations of the layers behind a cut, made once for all of them.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    origin, valid : Tensor
        (B, K) long, the tokens' columns in the whole prompt; (B, K) bool, False on filler.
    full : bool or None
        Whether ``valid`` is True everywhere; None: it is read.
    log_counts : Tensor or None
        (B, K) float32, the logarithms of the tokens' weights.
    """

    def __init__(
        self,
        parts: ModelSpec,
        origin: Tensor,
        valid: Tensor,
        full: bool | None,
        log_counts: Tensor | None,
    ) -> None:
        self._parts, self._origin, self._valid = parts, origin, valid
        self._full, self._log_counts = full, log_counts
        self._made: dict[tuple[int, int], tuple[Any, Any]] = {}

    def mask(self, index: int, mask: Tensor | None, cache: Any, dtype: torch.dtype) -> Any:
        """A layer's attention mask, from that of the whole prompt."""
        count = stored = self._valid.shape[1]
        if cache is not None:
            stored = cache.layers[index].get_mask_sizes(count)[0]
        key = (id(mask), stored)
        if key not in self._made:
            if self._full is None:
                self._full = bool(self._valid.all())
            causal = getattr(self._parts.attentions[index], "is_causal", True)
            how = causal, self._parts.config._attn_implementation, dtype
            kept = self._origin, self._valid, self._full, self._log_counts
            self._made[key] = mask, shorten(mask, kept, stored, how)
        return self._made[key][1]

    def rotations(self, rotations: Any) -> Any:
        """Gather cosines and sines, (..., B or 1, T, D) each."""
        pair = rotations if isinstance(rotations, tuple) else (rotations,)
        key = (id(pair[0]), -1)
        if key not in self._made:
            self._made[key] = pair, tuple(take(x, self._origin, -3, -2) for x in pair)
        short = self._made[key][1]
        return short if isinstance(rotations, tuple) else short[0]


def shorten(
    mask: Tensor | None,
    kept: tuple[Tensor, Tensor, bool, Tensor | None],
    stored: int,
    how: tuple[bool, str | None, torch.dtype],
) -> Tensor | None:
    """A layer's attention mask for the tokens that are left, with their weights in it.

    Parameters
    ----------
    mask : Tensor or None
        Of the whole prompt; see `shorten_mask`.
    kept : tuple
        ``origin`` (B, K) long; ``valid`` (B, K) bool; whether that is True everywhere; the
        logarithms of the weights, (B, K) float32, or None.
    stored : int
        Keys of the layer's attention.
    how : tuple
        Whether attention is causal without a mask, its implementation, the dtype of masks.
    """
    origin, valid, full, log_counts = kept
    causal, implementation, dtype = how
    count = valid.shape[1]
    plain = mask is None and full
    simple = plain and causal and stored == count
    if simple and log_counts is not None and not devices.on_host(valid):
        return weigh_causal(log_counts, dtype)
    # without a mask, attention reads the first `count` keys only
    kv_length = count if plain else stored
    short = shorten_mask(mask, origin, valid, kv_length, causal, implementation, dtype, full)
    if log_counts is None:
        return short
    return weigh_mask(short, log_counts[:, None, None], valid, stored, causal, dtype)


def weigh_causal(log_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """`weigh_mask` of causal attention without padding, in the fewest launches.

    Rows begin at multiples of 8 numbers: PyTorch copies masks of other strides in every layer.

    Parameters
    ----------
    log_counts : Tensor
        (B, K) float32.
    dtype : torch.dtype
        The mask's.

    Returns
    -------
    Tensor
        (B, 1, K, K), additive.
    """
    batch, count = log_counts.shape
    shape, lowest = (batch, 1, count, -(-count // 8) * 8), torch.finfo(dtype).min
    mask = torch.full(shape, lowest, dtype=dtype, device=log_counts.device).triu_(1)
    mask = mask[..., :count]
    return mask.add_(log_counts[:, None, None])
