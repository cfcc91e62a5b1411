"""The choice of the kernel for an FFN."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from corematching.backends.kernels.interface import IndexedKernel
from corematching.model.ffn_weights import FFNWeights

log = logging.getLogger(__name__)

KERNELS = {
    "cpu": "corematching.backends.cpu.native",
    "cuda": "corematching.backends.cuda.triton_ffn",
}


def find_kernel(weights: FFNWeights) -> IndexedKernel | None:
    """The kernel for these weights, or None where only PyTorch's operators can run them.

    Parameters
    ----------
    weights : FFNWeights
        The weights in the layout of the decode steps.
    """
    module = KERNELS.get(weights.up.device.type)
    if module is None:
        return None
    try:
        kernel: Any = importlib.import_module(module).KERNEL
    except (ImportError, AttributeError) as error:
        log.debug("no kernel from %s: %s", module, error)
        return None
    reason = kernel.why_unsupported(weights)
    if reason is not None:
        log.debug("%s kernel: %s", kernel.name, reason)
        return None
    return kernel
