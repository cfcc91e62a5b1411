"""Gathers and attention masks for the tokens that survive a cut.

Survivors are right-aligned, like left padding: the last column is every sample's last token, and
samples with fewer survivors have invalid filler columns in front.
Shapes: B samples, T tokens before the cut, K tokens after it, Q queries, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def survivors(keep: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Order of the kept columns.

    Parameters
    ----------
    keep : Tensor
        (B, T) bool.
    most : int or None
        K, where it is known; else this waits for the device.

    Returns
    -------
    order : Tensor
        (B, K) long, kept columns in their old order, right-aligned; K is the batch's maximum.
    valid : Tensor
        (B, K) bool, False on the filler in front of a sample with fewer survivors.
    """
    count = max(int(keep.sum(dim=1).max()), 1) if most is None else most
    order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -count:]
    return order, keep.gather(1, order)


def take(x: Tensor, order: Tensor, batch: int = 0, seq: int = 1) -> Tensor:
    """Gather ``order`` (B, K) along dimension ``seq`` of ``x``; dimension ``batch`` may be 1."""
    batch, seq = batch % x.ndim, seq % x.ndim
    order = order.to(x.device)
    rows, count = order.shape
    shape = list(x.shape)
    if rows == shape[batch] == 1:
        return x.index_select(seq, order[0])  # several times as fast as gather
    if shape[batch] != rows:
        shape[batch] = rows
        x = x.expand(shape)
    view = [1] * x.ndim
    view[batch], view[seq] = rows, count
    shape[seq] = count
    return x.gather(seq, order.view(view).expand(shape))


def padding_of(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """The valid tokens of a prompt, from its attention mask.

    Parameters
    ----------
    mask : Tensor or mapping or None
        The attention mask of a model's forward: (B, T) or (B, 1, T, S), bool or additive, or one
        such mask per layer type.
    batch, length : int
        B and T.
    device : torch.device
        The result's device.

    Returns
    -------
    Tensor
        (B, T) bool, False on padding.
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -length:].to(device=device, dtype=torch.bool)
    # every token sees itself, unless it is padding
    own = mask[:, 0, :, :length].diagonal(dim1=-2, dim2=-1)
    own = own if own.dtype == torch.bool else own >= 0
    return own.expand(batch, length).to(device)


def shorten_mask(
    mask: Tensor | None,
    origin: Tensor,
    valid: Tensor,
    kv_length: int,
    causal: bool,
    implementation: str | None,
    dtype: torch.dtype,
    full: bool | None = None,
) -> Tensor | None:
    """The attention mask of a layer for the survivors.

    Parameters
    ----------
    mask : Tensor or None
        The mask of the whole prompt: (B, 1, T, S) with S >= T, bool or additive; (B, T) for flash
        attention; None for plain causal attention (or plain attention in both directions).
    origin : Tensor
        (B, K) long, each survivor's column in the whole prompt.
    valid : Tensor
        (B, K) bool, False on filler.
    kv_length : int
        Keys of the layer's attention: K, or more with a static cache.
    causal : bool
        Whether a missing mask means causal attention.
    implementation : str or None
        The model's attention implementation.
    dtype : torch.dtype
        The dtype of additive masks.
    full : bool or None
        Whether ``valid`` is True everywhere; None: read it.

    Returns
    -------
    Tensor or None
        (B, 1, K, kv_length), or (B, K), or None where no mask is needed.
    """
    full = bool(valid.all()) if full is None else full
    if mask is None and full:
        return None
    flash = implementation is not None and "flash" in implementation
    if flash or (mask is not None and mask.ndim == 2):
        return None if full and kv_length == valid.shape[1] else valid
    if mask is None:
        short = _plain_mask(valid, causal, implementation, dtype)
    else:
        length = mask.shape[-2]
        rows = take(mask[..., :length], origin, 0, 2)
        short = take(rows, origin, 0, 3)
        blocked = ~valid.to(mask.device)[:, None, None, :]
        short = short.masked_fill(blocked, _blocked_value(mask.dtype))
    missing = kv_length - short.shape[-1]
    return F.pad(short, (0, missing), value=_blocked_value(short.dtype)) if missing > 0 else short


def weigh_mask(
    mask: Tensor | None,
    log_counts: Tensor,
    valid: Tensor,
    kv_length: int,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Add log counts to a layer's mask, as `shorten_mask` returns it.

    Parameters
    ----------
    mask : Tensor or None
        (B, 1, K, S), bool or additive; None for plain attention, causal or not.
    log_counts : Tensor
        (B, 1, K or 1, K), for the first K keys; further keys count once.
    valid : Tensor
        (B, K) bool, False on filler.
    kv_length : int
        S, keys of the layer's attention.
    causal : bool
        Whether a missing mask means causal attention.
    dtype : torch.dtype
        The result's dtype.

    Returns
    -------
    Tensor
        (B, 1, K, S), additive.
    """
    if mask is None:
        mask = _plain_mask(valid, causal, None, dtype)
    missing = kv_length - mask.shape[-1]
    mask = F.pad(mask, (0, missing), value=_blocked_value(mask.dtype)) if missing > 0 else mask
    return add_weights(mask, log_counts.to(mask.device), dtype)


def add_weights(mask: Tensor, log_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add log counts (B, 1, Q or 1, up to S) to a mask (B, 1, Q, S); hidden keys stay hidden."""
    lowest = torch.finfo(dtype).min
    hidden = ~mask if mask.dtype == torch.bool else mask <= lowest / 2
    log_counts = F.pad(log_counts.to(dtype), (0, mask.shape[-1] - log_counts.shape[-1]))
    if mask.dtype != torch.bool:
        log_counts = mask + log_counts
    return log_counts.masked_fill(hidden, lowest)


def _plain_mask(
    valid: Tensor, causal: bool, implementation: str | None, dtype: torch.dtype
) -> Tensor:
    """(B, 1, K, K), causal or not, without the invalid columns."""
    count = valid.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool, device=valid.device)
    allowed = (allowed.tril() if causal else allowed) & valid[:, None, None, :]
    if implementation == "eager":
        additive = torch.zeros(allowed.shape, dtype=dtype, device=valid.device)
        return additive.masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


def _blocked_value(dtype: torch.dtype) -> bool | float:
    return False if dtype == torch.bool else torch.finfo(dtype).min
