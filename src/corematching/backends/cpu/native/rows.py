"""Norms and rotary embedding of the rows of prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corematching.backends.cpu.native.library import (
    DTYPE_CODES,
    DTYPES,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.kernels.check import check_dims, check_optional, check_tensor, describe
from corematching.errors import InvalidTensorError


class Norm(NamedTuple):
    """An RMSNorm of Llama's form or, with a bias, PyTorch's LayerNorm.

    Attributes
    ----------
    weight : Tensor
        (d,), of x's dtype.
    epsilon : float
    bias : Tensor or None
        (d,), the LayerNorm's.
    """

    weight: Tensor
    epsilon: float
    bias: Tensor | None = None


def check_rows(x: Tensor) -> Tensor:
    """x as the kernels read it."""
    x = x.contiguous()
    check_tensor("x", x, tuple(x.shape), *DTYPES)
    return x


def check_norm(x: Tensor, norm: Norm) -> None:
    """Refuse a norm that is not for rows of x's size and dtype."""
    check_tensor("the norm's weight", norm.weight, tuple(x.shape[-1:]), x.dtype)
    check_optional("the norm's bias", norm.bias, tuple(x.shape[-1:]), x.dtype)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The norm of every row: (..., d) to (..., d), float32 or bfloat16.

    Raises
    ------
    InvalidTensorError
        The norm is of another size or dtype.
    """
    kernels = find_kernels()
    x = check_rows(x)
    check_norm(x, norm)
    if not x.numel():
        return torch.empty_like(x)
    out = torch.empty_like(x)
    width = x.shape[-1]
    call = compiled.Normalize().set(
        x=x.data_ptr(), norm=norm.weight.data_ptr(), norm_bias=address(norm.bias),
        out=out.data_ptr(), rows=x.numel() // width, width=width, epsilon=norm.epsilon,
        threads=torch.get_num_threads(), dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    kernels.normalize(call)
    return out


def check_rope(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Refuse cosines and sines that are not (B or 1, T, D), contiguous, for x, (B, T, ...)."""
    check_dims("the cosines", cos, 3)
    shape = (cos.shape[0] if cos.shape[0] == 1 else x.shape[0], x.shape[1], head_dim)
    check_tensor("the cosines", cos, shape, x.dtype)
    check_tensor("the sines", sin, shape, x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, and each where attention and caches want it.

    Parameters
    ----------
    x : Tensor
        (B, T, H + 2G, D), queries, keys and values, contiguous; the queries are rotated in place.
    cos, sin : Tensor
        (B or 1, T, D), of x's dtype.
    kv_heads : int
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
    kernels = find_kernels()
    if x.ndim != 4 or not 0 < 2 * kv_heads < x.shape[2] or x.shape[3] % 2:
        raise InvalidTensorError(
            f"{describe(x)} is no (B, T, H + 2G, D) with {kv_heads} key-value heads and an even D: "
            "pass such x"
        )
    batch, length, total, head_dim = x.shape
    heads, cos, sin = total - 2 * kv_heads, cos.contiguous(), sin.contiguous()
    check_tensor("x", x, (batch, length, total, head_dim), *DTYPES)
    check_rope(x, cos, sin, head_dim)
    key, value = x.new_empty(2, batch, kv_heads, length, head_dim).unbind()
    if x.numel():
        call = compiled.Rope().set(
            x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), keys=key.data_ptr(),
            values=value.data_ptr(), batch=batch, length=length, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, rope_rows=cos.shape[0] * length, threads=torch.get_num_threads(),
            dtype=DTYPE_CODES[x.dtype],
        )  # fmt: skip
        kernels.rope(call)
    return x[:, :, :heads].transpose(1, 2), key, value
