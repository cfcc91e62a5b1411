"""The machine: its load and its highest speeds."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from corematching.devices import product_dtype
from corematching.errors import BusyMachineError
from corematching.extras import require

psutil = require("psutil", "bench", "a benchmark")

BUSY_RATIO = 0.10
PROBE_SECONDS = 1.0
LONG_ENOUGH = 0.05
"""Seconds of a matrix product that can be trusted."""
SMALLEST_PRODUCT = 256
IDLE_FIELDS = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user time already


@dataclass(frozen=True)
class Ceilings:
    """The highest speeds of the machine, measured.

    Attributes
    ----------
    copy : float
        Bytes per second of a copy, those read and those written.
    matmul : float
        FLOP/s of a square matrix product.
    matmul_dtype : str
        The product's dtype: the run's, or float32 where the processor has no products of that.
    """

    copy: float
    matmul: float
    matmul_dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class CpuMeter:
    """Counts the processor time of other programs since its creation."""

    def __init__(self) -> None:
        self._start = self._read()

    def ratio(self) -> float:
        """The ratio of the machine's processor time that others used so far, in [0, 1]."""
        busy, own, total = (b - a for a, b in zip(self._start, self._read(), strict=True))
        return min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()._asdict()
        busy = sum(value for name, value in times.items() if name not in IDLE_FIELDS)
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        mine += sum(_cpu_seconds(child) for child in psutil.Process().children(recursive=True))
        return busy, mine, time.monotonic() * (psutil.cpu_count() or 1)


def _cpu_seconds(process: Any) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def probe_others(seconds: float = PROBE_SECONDS) -> float:
    """The ratio of the processor time that other programs use, over a second, in [0, 1]."""
    meter = CpuMeter()
    time.sleep(seconds)
    return meter.ratio()


def require_quiet(probe: Callable[[], float] = probe_others, force: bool = False) -> float:
    """Check that the machine is quiet enough to compare times.

    Returns
    -------
    float
        The ratio of the processor time that other programs use.

    Raises
    ------
    BusyMachineError
        It is more than 10 %, and ``force`` is False.
    """
    ratio = probe()
    if ratio > BUSY_RATIO and not force:
        raise BusyMachineError(
            f"other programs use {ratio:.0%} of this machine's processor time, so times cannot be "
            "compared: wait until they are done, or pass --force to measure all the same"
        )
    return ratio


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a copy and a matrix product; the best of several, about a second each.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
        Of the run; the product is measured in `product_dtype` of it.
    """
    large = device.type == "cuda"
    source = torch.zeros(1 << (31 if large else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).fill_(1)
    copy = best_seconds(lambda: target.copy_(source), device)
    dtype = product_dtype(device, dtype)
    size, multiply = grow_product(device, dtype, 8192 if large else 2048)
    matmul = best_seconds(multiply, device)
    return Ceilings(
        copy=2 * source.numel() / copy,
        matmul=2 * size**3 / matmul,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def grow_product(
    device: torch.device, dtype: torch.dtype, largest: int
) -> tuple[int, Callable[[], Any]]:
    """A product of two square matrices that takes long enough to be timed, and their size."""
    size = SMALLEST_PRODUCT
    while True:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        multiply = functools.partial(torch.matmul, left, right, out=torch.empty_like(left))
        if size >= largest or best_seconds(multiply, device, 0.0, 1) >= LONG_ENOUGH:
            return size, multiply
        size *= 2


def best_seconds(
    work: Callable[[], Any], device: torch.device, least: float = 1.0, fewest: int = 5
) -> float:
    """The shortest of at least ``fewest`` runs that take ``least`` seconds together.

    One more comes before them and is not timed.
    """
    work()
    synchronise(device)
    runs: list[float] = []
    while len(runs) < fewest or sum(runs) < least:
        start = time.perf_counter()
        work()
        synchronise(device)
        runs.append(time.perf_counter() - start)
    return min(runs)


def synchronise(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
