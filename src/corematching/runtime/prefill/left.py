"""The tokens that a cut leaves, and the attention masks of the layers behind it.

Shapes: B samples, T tokens before the cut, K tokens after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corematching import devices
from corematching.backends.kernels.selection import Survivors, line_up
from corematching.cache.masks import shorten_mask, survivors, weigh_mask


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
