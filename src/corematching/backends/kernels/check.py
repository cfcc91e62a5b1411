"""What kernels refuse before they read memory; the same error for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from corematching.errors import InvalidTensorError


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype, device: str = "cpu"
) -> None:
    """Refuse a tensor that is not contiguous, or of another shape, dtype or kind of device.

    Parameters
    ----------
    name : str
        What the message calls it.
    x : Tensor
        The tensor.
    shape : tuple of int
        Its shape.
    dtypes : torch.dtype
        What its numbers may be.
    device : str
        ``cpu`` or ``cuda``.

    Raises
    ------
    InvalidTensorError
        It is none such.
    """
    if (
        isinstance(x, Tensor)
        and x.shape == shape
        and x.dtype in dtypes
        and x.device.type == device
        and x.is_contiguous()
    ):
        return
    kinds = _name(" or ".join(map(str, dtypes)))
    raise InvalidTensorError(
        f"expected {name} of shape {tuple(shape)}, {kinds}, contiguous, on '{device}', got "
        f"{describe(x)}: pass such a tensor"
    )


def check_optional(
    name: str, x: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype, device: str = "cpu"
) -> None:
    """The same, where there may be none."""
    if x is not None:
        check_tensor(name, x, shape, *dtypes, device=device)


def check_dims(name: str, x: Tensor, dims: int) -> None:
    """Refuse a tensor of another number of dimensions.

    Raises
    ------
    InvalidTensorError
        It has another one.
    """
    if not isinstance(x, Tensor) or x.ndim != dims:
        raise InvalidTensorError(
            f"expected {name} of {dims} dimensions, got {describe(x)}: pass such a tensor"
        )


def check_order(indices: Tensor, width: int) -> None:
    """Refuse (S, K) indices that are not ascending in [0, width); waits for the device.

    Raises
    ------
    InvalidTensorError
        They are not.
    """
    if bool(find_disorder(indices, width)):
        raise refuse_order(width)


def find_disorder(indices: Tensor, width: int) -> Tensor:
    """() bool: whether (S, K) indices are not ascending, each once, in [0, width)."""
    low, high = (indices[:, :1] < 0).any(), (indices[:, -1:] >= width).any()
    return low | high | (indices[:, 1:] <= indices[:, :-1]).any()


def refuse_order(width: int) -> InvalidTensorError:
    """The error for indices that do not ascend in [0, width)."""
    return InvalidTensorError(
        f"neuron indices must ascend within [0, {width}), each at most once: sort them, and leave "
        "out what is given twice"
    )


def describe(x: object) -> str:
    """A tensor's shape, dtype, device and layout in a few words; of other objects the type."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    layout = "" if x.is_contiguous() else ", not contiguous"
    return f"{tuple(x.shape)}, {_name(str(x.dtype))}, on '{x.device}'{layout}"


def _name(dtypes: str) -> str:
    return dtypes.replace("torch.", "")
