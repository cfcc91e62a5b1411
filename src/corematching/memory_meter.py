"""The memory of a device that this process uses."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass(frozen=True)
class ProcessMemory:
    """This process's memory in bytes.

    Attributes
    ----------
    now : int
        Resident.
    highest : int
        Resident at most since the peak was reset; where the system has no such counter, over the
        whole life of the process, or (Windows) ``now``.
    mapped : int
        The part of ``now`` that is mapped from files; 0 where the system does not say.
    """

    now: int
    highest: int
    mapped: int

    @classmethod
    def read(cls) -> ProcessMemory:
        """The present values."""
        if not STATUS.exists():
            import psutil  # a dependency where there is no /proc

            now = int(psutil.Process(os.getpid()).memory_info().rss)
            return cls(now, max(now, _lifetime_peak()), 0)
        lines = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
        return cls(sizes["VmRSS:"], sizes["VmHWM:"], sizes["RssFile:"])


def _lifetime_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class MemoryMeter:
    """The device's memory in use by this process, and its peak since the last `reset`.

    On a GPU: bytes that PyTorch's allocator has given out. On a CPU: resident memory.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = ProcessMemory(0, 0, 0)

    def reset(self) -> None:
        """Forget the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if CLEAR.exists():
            CLEAR.write_text(RESET_PEAK)
        self._before = ProcessMemory.read()

    @property
    def used(self) -> int:
        """Bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return ProcessMemory.read().now

    @property
    def peak(self) -> int:
        """Most bytes in use since `reset`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return ProcessMemory.read().highest

    def peak_with(self, held: int) -> int:
        """Most bytes in use since `reset` by a model that held ``held`` bytes then.

        On a CPU that is ``held`` and the growth of the process (Linux; elsewhere its growth until
        now). Pages of files that it maps do not count: mapped weights are held already.
        """
        if self.device.type == "cuda":
            return self.peak
        now, before = ProcessMemory.read(), self._before
        highest = now.highest if STATUS.exists() else now.now
        mapped = max(0, now.mapped - before.mapped)
        return held + max(0, highest - before.now - mapped)
