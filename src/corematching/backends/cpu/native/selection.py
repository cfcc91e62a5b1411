"""What is chosen from a prompt: sums over its tokens, and the highest of many scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corematching.backends.cpu.native.library import (
    DTYPE_CODES,
    DTYPES,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.kernels.check import check_tensor, describe
from corematching.errors import InvalidTensorError

SUM_CODES = {"values": 0, "sizes": 1, "unit squares": 2}


def sum_rows(values: Tensor, tokens: Tensor, what: str) -> Tensor | None:
    """A sum over each sample's tokens in one or two passes, without a float32 copy.

    Parameters
    ----------
    values : Tensor
        (B, T, F), float32, bfloat16 or bool.
    tokens : Tensor
        (B, T) bool, the tokens that count.
    what : str
        ``values``, their ``sizes`` (magnitudes), or ``unit squares``: the squares of each token's
        values over their sum.

    Returns
    -------
    Tensor or None
        (B, F) float32, the same for any number of threads; None where no kernel can run: no
        extension, another device or dtype, values that are not contiguous.

    Raises
    ------
    InvalidTensorError
        The tokens are no (B, T) bool.
    """
    kernels = _kernels_for(values, *DTYPE_CODES)
    if kernels is None:
        return None
    batch, length, width = _sizes_of(values)
    tokens = tokens.contiguous()
    check_tensor("the tokens", tokens, (batch, length), torch.bool)
    if what not in SUM_CODES:
        raise InvalidTensorError(f"no sum of {what!r}: choose {', '.join(SUM_CODES)}")
    factors = torch.empty(batch, length, dtype=torch.float32, device=values.device)
    total = torch.empty(batch, width, dtype=torch.float32, device=values.device)
    call = compiled.SumTokens().set(
        values=values.data_ptr(), tokens=tokens.data_ptr(), factors=factors.data_ptr(),
        out=total.data_ptr(), batch=batch, length=length, width=width,
        threads=torch.get_num_threads(), what=SUM_CODES[what], dtype=DTYPE_CODES[values.dtype],
    )  # fmt: skip
    kernels.sum_tokens(call)
    return total


def weigh_marks(marks: Tensor, weights: Tensor) -> Tensor | None:
    """The weights (B, F), float32, of what each token marks, (B, T, F) bool: (B, T), or None."""
    kernels = _kernels_for(marks, torch.bool)
    if kernels is None:
        return None
    batch, length, width = _sizes_of(marks)
    weights = weights.float().contiguous()
    check_tensor("the weights", weights, (batch, width), torch.float32)
    total = torch.empty(batch, length, dtype=torch.float32)
    kernels.weigh_marks(
        *(marks.data_ptr(), weights.data_ptr(), total.data_ptr()),
        *(batch, length, width, torch.get_num_threads()),
    )
    return total


def mark_highest(values: Tensor, counts: Tensor, absolute: bool) -> Tensor | None:
    """Mark what is above 0 and not below each token's ``counts``-th largest of (B, T, F), or None.

    The counts, (B, T, 1) long, lie in [1, F].
    """
    kernels = _kernels_for(values, *DTYPES)
    if kernels is None:
        return None
    batch, length, width = _sizes_of(values)
    try:
        counts = counts.expand(batch, length, 1).contiguous()
    except RuntimeError as error:
        raise InvalidTensorError(
            f"expected counts ({batch}, {length}, 1), got {describe(counts)}: give one per token"
        ) from error
    check_tensor("the counts", counts, (batch, length, 1), torch.long)
    _check_range("counts", counts, 1, width)
    marks = torch.empty(batch, length, width, dtype=torch.bool)
    kernels.mark_largest(
        *(values.data_ptr(), counts.data_ptr(), marks.data_ptr(), batch * length, width),
        *(absolute, torch.get_num_threads(), DTYPE_CODES[values.dtype]),
    )
    return marks


def _kernels_for(values: Tensor, *dtypes: torch.dtype) -> Any:
    """The compiled kernels, if they can read these values."""
    if values.device.type != "cpu" or values.dtype not in dtypes or not values.is_contiguous():
        return None
    return find_kernels() if values.numel() else None


def pick_highest(scores: Tensor, count: int) -> Tensor | None:
    """The places of each row's ``count`` highest scores, ascending; of equal ones the first.

    Parameters
    ----------
    scores : Tensor
        (B, F) float32.
    count : int
        At most F.

    Returns
    -------
    Tensor or None
        (B, count) long; None where no kernel can run: no extension, another device or dtype, a
        score that is NaN.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return None
    kernels = find_kernels()
    if kernels is None:
        return None
    scores = scores.contiguous()
    if scores.ndim != 2 or not 0 <= count <= scores.shape[1]:
        raise InvalidTensorError(
            f"cannot pick {count} of each row of {describe(scores)}: pass (B, F) scores and a "
            "count of at most F"
        )
    places = torch.empty(scores.shape[0], count, dtype=torch.long)
    width = scores.shape[1]
    for row in range(scores.shape[0]):
        start, out = scores.data_ptr() + 4 * row * width, places.data_ptr() + 8 * row * count
        if not kernels.top_k(start, width, count, out):
            return None
    return places


def find_size(
    values: Tensor, tokens: Tensor, neurons: Tensor | None, ranks: Tensor
) -> Tensor | None:
    """The ``ranks``-th smallest magnitude of each sample, (B,) float32; 0 where the rank is.

    None where no kernel can run: no extension, another device or dtype, values that are not
    contiguous, or one that counts is not finite.
    """
    kernels = _kernels_for(values, *DTYPES)
    if kernels is None:
        return None
    batch, length, width = _sizes_of(values)
    tokens, ranks = tokens.contiguous(), ranks.contiguous()
    check_tensor("the tokens", tokens, (batch, length), torch.bool)
    check_tensor("the ranks", ranks, (batch,), torch.long)
    each = width
    if neurons is not None:
        neurons, each = neurons.contiguous(), neurons.shape[-1]
        check_tensor("the neurons", neurons, (batch, each), torch.long)
        _check_range("neurons", neurons, 0, width - 1)
    _check_range("ranks", ranks, 0, tokens.sum(1) * each)
    found = torch.empty(batch, dtype=torch.float32)
    fine = kernels.kth_size(
        *(address(x) for x in (values, tokens, neurons, ranks, found)),
        *(batch, length, width, 0 if neurons is None else neurons.shape[1]),
        DTYPE_CODES[values.dtype],
    )
    return found if fine else None


def _sizes_of(values: Tensor) -> tuple[int, int, int]:
    """B, T and F of (B, T, F)."""
    if values.ndim != 3:
        raise InvalidTensorError(
            f"expected (samples, tokens, neurons), got {describe(values)}: pass such values"
        )
    batch, length, width = values.shape
    return batch, length, width


def _check_range(name: str, x: Tensor, least: int, most: int | Tensor) -> None:
    """Refuse whole numbers outside [least, most]."""
    if bool(((x < least) | (x > most)).any()):
        bound = f"at most {most}" if isinstance(most, int) else "of as many as count"
        raise InvalidTensorError(
            f"{name} from {int(x.min())} to {int(x.max())} lie outside what they count: give some "
            f"of at least {least}, {bound}"
        )
