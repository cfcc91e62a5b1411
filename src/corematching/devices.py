"""The dtypes that a device multiplies at full speed, and the dtype to load a model in."""

from __future__ import annotations

import torch

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
