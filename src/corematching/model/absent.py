"""The placeholder for a parameter whose weight is outside fast memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import InputError

PROPERTIES = (
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps",
    "is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "names", "nbytes", "ndim",
    "requires_grad", "retains_grad", "shape",
)  # fmt: skip
METHODS = (
    "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_inference", "is_pinned", "is_shared", "is_signed", "ndimension",
    "nelement", "numel", "requires_grad_", "size", "stride",
)  # fmt: skip
KNOWN: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in METHODS]
    + [getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")]
    + [torch.is_complex, torch.is_floating_point, torch.numel]
)
"""Functions that an absent weight supports: its metadata, never its values."""


class AbsentWeight(nn.Parameter):
    """A parameter whose weight is outside fast memory.

    Shape, dtype, device and ``requires_grad`` are the weight's. Operators that would read or change
    its values raise `InputError`.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in KNOWN:
            raise InputError(
                "an FFN weight is outside of memory while a method with memory=... is installed, "
                f"so '{_name(func)}' cannot read or change it: remove the method first; a model "
                "from load(path, memory=...) has to be loaded with from_pretrained for that"
            )
        return torch._C._disabled_torch_function_impl(func, types, tuple(args), kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AbsentWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return str(getattr(func.__self__, "__name__", name)) if name in ("__get__", "__set__") else name
