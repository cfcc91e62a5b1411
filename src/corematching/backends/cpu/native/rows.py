"""Norms and rotations of the rows of prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.kernel import DTYPES, address
from corematching.backends.kernels.check import check_dims, check_optional, check_tensor, describe
from corematching.errors import InvalidTensorError


class Norm(NamedTuple):
    """An RMSNorm of Llama's form or, with a shift, PyTorch's LayerNorm.

    Attributes
    ----------
    weight : Tensor
        (d,), of x's dtype.
    epsilon : float
    shift : Tensor or None
        (d,), the LayerNorm's bias.
    """

    weight: Tensor
    epsilon: float
    shift: Tensor | None = None


def check_rows(x: Tensor) -> Tensor:
    """x as the C code reads it."""
    x = x.contiguous()
    check_tensor("x", x, tuple(x.shape), *DTYPES)
    return x


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse a norm that is not for rows of x's size and dtype."""
    check_tensor("the norm's weight", norm.weight, tuple(x.shape[-1:]), x.dtype)
    check_optional("the norm's shift", norm.shift, tuple(x.shape[-1:]), x.dtype)


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """The norm of every row: (..., d) to (..., d), float32 or bfloat16.

    Raises
    ------
    InvalidTensorError
        The norm is of another size or dtype.
    """
    library = find_library()
    assert library is not None
    x = check_rows(x)
    check_norm(x, norm)
    if not x.numel():
        return torch.empty_like(x)
    out = torch.empty_like(x)
    width = x.shape[-1]
    library.cm_normalise(
        x.data_ptr(), norm.weight.data_ptr(), address(norm.shift), out.data_ptr(),
        x.numel() // width, width, norm.epsilon, torch.get_num_threads(),
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def check_angles(x: Tensor, cos: Tensor, sin: Tensor, size: int) -> None:
    """Refuse cosines and sines that are not (B or 1, T, D), contiguous, for x, (B, T, ...)."""
    check_dims("the cosines", cos, 3)
    shape = (cos.shape[0] if cos.shape[0] == 1 else x.shape[0], x.shape[1], size)
    check_tensor("the cosines", cos, shape, x.dtype)
    check_tensor("the sines", sin, shape, x.dtype)


def rotate_apart(x: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, and each where attention and caches want it.

    Parameters
    ----------
    x : Tensor
        (B, T, H + 2G, D), queries, keys and values, contiguous; the queries are rotated in place.
    cos, sin : Tensor
        (B or 1, T, D), of x's dtype.
    groups : int
        G, heads of keys and of values.

    Returns
    -------
    query : Tensor
        (B, H, T, D), in x's memory.
    key, value : Tensor
        (B, G, T, D), contiguous, in memory of their own.

    Raises
    ------
    InvalidTensorError
        Something is of another shape or dtype, x is not contiguous, or D is odd.
    """
    library = find_library()
    assert library is not None
    if x.ndim != 4 or not 0 < 2 * groups < x.shape[2] or x.shape[3] % 2:
        raise InvalidTensorError(
            f"{describe(x)} is no (B, T, H + 2G, D) with {groups} groups and an even D: pass such x"
        )
    batch, length, total, size = x.shape
    heads, cos, sin = total - 2 * groups, cos.contiguous(), sin.contiguous()
    check_tensor("x", x, (batch, length, total, size), *DTYPES)
    check_angles(x, cos, sin, size)
    key, value = x.new_empty(2, batch, groups, length, size).unbind()
    if not x.numel():
        return x[:, :, :heads].transpose(1, 2), key, value
    library.cm_rotate_apart(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), key.data_ptr(), value.data_ptr(),
        batch, length, heads, groups, size, cos.shape[0] * length,
        torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
    return x[:, :, :heads].transpose(1, 2), key, value
