"""Attention of whole prompts on a CPU's matrix tiles."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.products import STEP, Scratch, has_tiles
from corematching.backends.cpu.native.structs import AttentionStruct, integers
from corematching.errors import InvalidTensorError

MASKS = {torch.bool: 1, torch.bfloat16: 2}
"""The numbers of `FLAGS` and `SUMMANDS` in the C code; 0 is no mask."""
MOST_KEYS = 8192
"""A block of queries sees all keys at once; more of them would leave the processor's caches."""


def refuse_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why `TiledAttention` cannot take these; None if it can."""
    if not has_tiles():
        return "there are no matrix tiles"
    for x in (query, key, value):
        if type(x) is not Tensor or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return "it takes bfloat16 on a CPU"
        if x.ndim != 4 or x.stride(-1) != 1 or x.shape[-1] != query.shape[-1]:
            return "a head's numbers do not stand side by side, or differ in number"
    if query.shape[-1] % STEP:
        return f"a head's size, {query.shape[-1]}, is no multiple of {STEP}"
    if key.shape != value.shape or query.shape[0] != key.shape[0]:
        return "keys, values and queries do not belong together"
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        return "the heads do not share keys evenly"
    if not query.shape[2]:
        return "there are no queries"
    return refuse_keys(mask, query.shape[0], query.shape[2], key.shape[2])


def refuse_keys(mask: Tensor | None, batch: int, length: int, stored: int) -> str | None:
    """Why tiles cannot attend to so many keys, or under this mask; None if they can."""
    if not 0 < stored <= MOST_KEYS:
        return f"there are {stored} keys, of at most {MOST_KEYS}"
    if mask is None:
        return None
    if mask.dtype not in MASKS or mask.ndim != 4 or mask.device.type != "cpu":
        return "the mask is neither bool nor bfloat16, (B, 1, T, S)"
    fits = mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits &= mask.shape[2] in (1, length) and mask.shape[3] == stored
    if not fits or (mask.stride(-1) != 1 and mask.shape[-1] > 1):
        return "the mask has another shape"
    return None


def describe_mask(mask: Tensor) -> tuple[int, int, ctypes.Array[ctypes.c_int64]]:
    """Where a mask lies, its kind, and the numbers between its samples and between its rows."""
    steps = (mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2))
    return mask.data_ptr(), MASKS[mask.dtype], integers(*steps)


def _list_steps(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return integers(*x.stride()[:3])


class TiledAttention:
    """Attention of what `refuse_attention` takes.

    Softmax and sums are float32; weights and results are rounded to bfloat16.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()

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
            (B, H, T, D) bfloat16, samples, heads and tokens in any order.
        key, value : Tensor
            (B, G, S, D), the same; each serves H / G heads in a row.
        mask : Tensor or None
            (B or 1, 1, T or 1, S), bool (False hides a key) or bfloat16 (added to the scores).
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
            `refuse_attention` refuses them, or the factor is not above 0.
        """
        library = find_library()
        assert library is not None
        reason = refuse_attention(query, key, value, mask)
        if reason is None and not scaling > 0:
            reason = f"the factor of the scores is {scaling}"
        if reason is not None:
            raise InvalidTensorError(f"tiles cannot attend to these: {reason}")
        batch, heads, length, size = query.shape
        out = torch.empty(batch, length, heads, size, dtype=query.dtype)
        how = AttentionStruct(
            query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), out=out.data_ptr(),
            batch=batch, heads=heads, groups=key.shape[1], length=length, stored=key.shape[2],
            size=size, causal=causal, threads=torch.get_num_threads(), scaling=scaling,
        )  # fmt: skip
        how.step_query, how.step_key, how.step_value = map(_list_steps, (query, key, value))
        if mask is not None:
            how.mask, how.mask_kind, how.step_mask = describe_mask(mask)
        how.scratch = self._scratch.reserve(library.cm_attend_scratch(ctypes.byref(how)))
        library.cm_attend(ctypes.byref(how))
        return out
