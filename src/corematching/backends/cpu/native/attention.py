"""Attention of whole prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corematching.backends.cpu.native.library import (
    DTYPE_CODES,
    DTYPES,
    INSTALL_HINT,
    compiled,
    find_kernels,
)
from corematching.backends.cpu.native.scratch import Scratch
from corematching.errors import InvalidTensorError

BOOL_MASK, ADDED_MASK = 1, 2
HEAD_DIM_STEP = 8
"""The size of a head is a multiple of this."""


def why_unsupported_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> str | None:
    """Why `PrefillAttention` cannot take these; None if it can."""
    if find_kernels() is None:
        return f"there are no compiled kernels: {INSTALL_HINT}"
    for x in (query, key, value):
        if type(x) is not Tensor or x.dtype not in DTYPES or x.device.type != "cpu":
            return "it takes float32 and bfloat16 on a CPU"
        if x.dtype != query.dtype:
            return "queries, keys and values are of several dtypes"
        if x.ndim != 4 or x.stride(-1) != 1 or x.shape[-1] != query.shape[-1]:
            return "a head's numbers do not stand side by side, or differ in number"
    if not query.shape[-1] or query.shape[-1] % HEAD_DIM_STEP:
        return f"a head's size, {query.shape[-1]}, is no multiple of {HEAD_DIM_STEP}"
    if key.shape != value.shape or query.shape[0] != key.shape[0]:
        return "keys, values and queries do not belong together"
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        return "the heads do not share keys evenly"
    if not query.shape[2] or not key.shape[2]:
        return "there are no queries, or no keys"
    return why_unsupported_mask(mask, query.dtype, query.shape[0], query.shape[2], key.shape[2])


def why_unsupported_mask(
    mask: Tensor | None, dtype: torch.dtype, batch: int, length: int, keys: int
) -> str | None:
    """Why queries of this dtype and number cannot see so many keys under a mask; None if fine."""
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, dtype) or mask.ndim != 4 or mask.device.type != "cpu":
        return "the mask is neither bool nor of the queries' dtype, (B, 1, T, S)"
    fits = mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits &= mask.shape[2] in (1, length) and mask.shape[3] == keys
    if not fits or (mask.stride(-1) != 1 and mask.shape[-1] > 1):
        return "the mask has another shape"
    return None


def describe_mask(mask: Tensor) -> dict[str, Any]:
    """A mask's fields in the structs: where it lies, its kind, and its strides."""
    return {
        "mask": mask.data_ptr(),
        "mask_kind": BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK,
        "mask_strides": tuple(mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2)),
    }


class PrefillAttention:
    """Attention of what `why_unsupported_attention` finds no fault with.

    Softmax and sums are float32.

    Parameters
    ----------
    scratch : Scratch, optional
        Memory to work in, which other kernels may share.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self._scratch = Scratch() if scratch is None else scratch

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        causal: bool,
    ) -> Tensor:
        """``softmax(query @ key^T * scaling + mask) @ value``.

        Parameters
        ----------
        query : Tensor
            (B, H, T, D) float32 or bfloat16, samples, heads and tokens in any order; D is a
            multiple of 8.
        key, value : Tensor
            (B, G, S, D), the same; each serves H / G heads in a row.
        mask : Tensor or None
            (B or 1, 1, T or 1, S), bool (False hides a key) or of the queries' dtype (added to the
            scores).
        scaling : float
            Factor of the scores, above 0.
        causal : bool
            Whether query t sees the first t + 1 keys only.

        Returns
        -------
        Tensor
            (B, T, H, D), the same for any number of threads.

        Raises
        ------
        InvalidTensorError
            `why_unsupported_attention` finds fault with them, or the factor is not above 0.
        """
        reason = why_unsupported_attention(query, key, value, mask)
        if reason is None and not scaling > 0:
            reason = f"the factor of the scores is {scaling}"
        if reason is not None:
            raise InvalidTensorError(f"the kernel cannot attend to these: {reason}")
        batch, heads, length, head_dim = query.shape
        out = torch.empty(batch, length, heads, head_dim, dtype=query.dtype)
        call = compiled.Attention().set(
            query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), out=out.data_ptr(),
            query_strides=query.stride()[:3], key_strides=key.stride()[:3],
            value_strides=value.stride()[:3], batch=batch, heads=heads, kv_heads=key.shape[1],
            length=length, keys=key.shape[2], head_dim=head_dim, threads=torch.get_num_threads(),
            scaling=scaling, causal=bool(causal), dtype=DTYPE_CODES[query.dtype],
        )  # fmt: skip
        if mask is not None:
            call.set(**describe_mask(mask))
        kernels = find_kernels()
        call.scratch = self._scratch.reserve(kernels.attention_scratch(call))
        kernels.attention(call)
        return out
