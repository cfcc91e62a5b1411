"""The dtypes that a device multiplies at full speed, and what goes between it and the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

CHECKS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def default_device() -> str:
    """A CUDA device when there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether matrix products of a dtype run at full speed.

    A CPU without 16-bit products (AVX2 alone, for one) converts number by number, which takes ten
    times as long as a product of float32.
    """
    if torch.device(device).type != "cpu" or dtype not in CHECKS:
        return True
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{CHECKS[dtype]}_supported", None)
    return has is not None and bool(has())


def product_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` where a device multiplies it, else float32."""
    return dtype if multiplies(device, dtype) else torch.float32


def on_host(x: Tensor) -> bool:
    """Whether a tensor can be read without waiting for a device."""
    return x.device.type == "cpu"


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on a device, which is not waited for.

    Parameters
    ----------
    values : np.ndarray
        Not written to afterwards.
    device : torch.device
        Where the tensor is to be.
    """
    return torch.from_numpy(values).to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor that is on its way to the host.

    The copy starts at once, without waiting. `read` waits for what the device had to do before it,
    which costs nothing where that is done by then.

    Parameters
    ----------
    x : Tensor
        Of any device.
    """

    def __init__(self, x: Tensor) -> None:
        self._event: Any = None
        self._values = x
        if x.is_cuda:
            self._values = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._values.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(x.device))

    def read(self) -> np.ndarray:
        """The values, in the tensor's shape."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        values: np.ndarray = self._values.detach().cpu().numpy()
        return values
