"""Counts the kernels that a piece of code launches, and how often it waits for the device.

Both can be counted on a machine without a GPU: each PyTorch operator that is no view and no
allocation launches a kernel, and so does each Triton program, which Triton's interpreter runs on
the CPU. `gpu_stand_in` has the library take a CPU for a GPU meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from corematching import devices
from corematching.backends.kernels import selection, statistics
from corematching.devices import HostCopy

NO_LAUNCH = frozenset(
    {"_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "squeeze_", "detach_"}
    | {"unsqueeze_", "transpose_", "resize_", "set_", "empty", "empty_like", "empty_strided"}
    | {"new_empty", "new_empty_strided", "pin_memory", "is_pinned"}
)
WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
    | {"unique_dim"}
)
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
READS = frozenset({"tolist", "cpu", "numpy"})


class LaunchCounter(TorchDispatchMode):
    """Counts launches and waits while it is active: ``with counter.counting(): ...``.

    Attributes
    ----------
    launches : Counter
        Kernels by the name of their operator or program.
    waits : Counter
        Reads of the device's memory that wait for it, by the name of their operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[LaunchCounter]:
        """A block in which everything is counted."""
        upload = devices.upload

        def count_upload(values: np.ndarray, device: torch.device) -> Tensor:
            self.launches["upload"] += 1
            with _disable_current_modes():
                return upload(values, device)

        def count_copy(copy: HostCopy, x: Tensor) -> None:
            self.launches["copy to host"] += 1
            with _disable_current_modes():
                make(copy, x)

        def read_freely(copy: HostCopy) -> np.ndarray:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return read(copy)

        make, read = HostCopy.__init__, HostCopy.read
        with (
            mock.patch.object(devices, "upload", count_upload),
            mock.patch.object(HostCopy, "__init__", count_copy),
            mock.patch.object(HostCopy, "read", read_freely),
            _programs_counted(self.launches),
            _Reads(self.waits),
            self,
        ):
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITS or (name in INDEXED and _by_mask(args)):
            self.waits[name] += 1
        if name not in NO_LAUNCH and not func.is_view:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts methods of tensors that copy them to the host."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu_stand_in() -> Iterator[None]:
    """Have the library take tensors on the CPU for tensors on a GPU.

    Triton has to be interpreted: set ``TRITON_INTERPRET=1`` before anything imports it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "on_host", lambda x: False))
        for module in (statistics, selection):
            modules: dict[str, str] = module.MODULES
            stack.enter_context(mock.patch.dict(modules, cpu=modules["cuda"]))
        yield


@contextlib.contextmanager
def _programs_counted(launches: Counter[str]) -> Iterator[None]:
    """Count each start of a Triton program once, whatever its interpreter calls."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):
            run = kind.run

            def count(self: Any, *args: Any, _run: Any = run, **kwargs: Any) -> Any:
                launches[self.fn.__name__] += 1
                with torch._C.DisableTorchFunction(), _disable_current_modes():
                    return _run(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(kind, "run", count))
        yield


def _by_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
