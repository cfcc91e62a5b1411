"""What a model takes of the memory under a cap: reckoned before it runs, measured while it does."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from corematching.errors import MemoryCapError
from corematching.report import MemoryReport
from corematching.sizes import format_size

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass
class MemoryPlan:
    """What has to fit under the cap at once, in bytes.

    Attributes
    ----------
    cap : int
        The cap.
    resident : int
        Weights that stay: all but the FFNs of the layers whose neurons are chosen.
    slots : int
        Two layers' weights, for the prompt.
    chosen : int
        Chosen neurons of one sample.
    """

    cap: int
    resident: int
    slots: int
    chosen: int

    def check(self, samples: int = 1, cache: int = 0, work: int = 0) -> int:
        """The bytes that a prompt needs.

        Parameters
        ----------
        samples : int
            Samples of the batch; each chooses its own neurons.
        cache : int
            Bytes of keys and values.
        work : int
            Bytes that the largest layer works with.

        Raises
        ------
        MemoryCapError
            They are more than the cap; the message has the numbers and what would lower them.
        """
        chosen = samples * self.chosen
        need = self.resident + self.slots + chosen + cache + work
        if need <= self.cap:
            return need
        parts = {
            "weights that stay": self.resident,
            "two layers on their way": self.slots,
            f"chosen neurons of {samples} sample(s)": chosen,
            "KV cache": cache,
            "the prompt's work": work,
        }
        listed = ", ".join(f"{format_size(n)} {name}" for name, n in parts.items() if n)
        raise MemoryCapError(
            f"{format_size(need)} do not fit under memory={format_size(self.cap)} ({listed}): "
            + self._advice(need, chosen, cache + work)
        )

    def _advice(self, need: int, chosen: int, prompt: int) -> str:
        over = need - self.cap
        hints = [f"raise the cap to at least {format_size(need)}"]
        if over < chosen:
            share = 1 - over / chosen
            hints.append(f"keep at most {share:.0%} of as many neurons (a lower ratio)")
        hints.append("leave fewer end layers dense")
        if prompt:
            hints.append("ask with fewer samples or a shorter prompt")
        return ", ".join(hints) + ", or load the model in a smaller dtype"


class MemoryMeter:
    """Measures the most memory that the model took since `start`.

    On a GPU: the most that PyTorch's allocator had given out. On a CPU: what is held, plus by how
    much the process grew at most (Linux; elsewhere by how much it has grown when asked). Pages of
    files that it maps do not count: weights that are mapped are held already.

    Parameters
    ----------
    device : torch.device
        Where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = 0
        self._before = ProcessMemory(0, 0, 0)

    def start(self, held: int) -> None:
        """Begin anew; the model holds ``held`` bytes."""
        self._held = held
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if CLEAR.exists():
            CLEAR.write_text(RESET_PEAK)
        self._before = ProcessMemory.read()

    def peak(self) -> int:
        """The most since `start`, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        now = ProcessMemory.read()
        mapped = max(0, now.mapped - self._before.mapped)
        return self._held + max(0, now.highest - self._before.now - mapped)


@dataclass(frozen=True)
class ProcessMemory:
    """This process's memory in bytes: now, at most, and what of it is mapped from files."""

    now: int
    highest: int
    mapped: int

    @classmethod
    def read(cls) -> ProcessMemory:
        """As it is now."""
        if not STATUS.exists():
            import psutil  # a dependency where there is no /proc

            now = int(psutil.Process(os.getpid()).memory_info().rss)
            return cls(now, now, 0)
        lines = (line.split() for line in STATUS.read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
        return cls(sizes["VmRSS:"], sizes["VmHWM:"], sizes["RssFile:"])


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share their memory count once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        if not tensor.is_meta:
            seen.setdefault(id(tensor), tensor.numel() * tensor.element_size())
    return sum(seen.values())


@dataclass
class MemoryUse:
    """What one run took; `report` turns it into numbers that last."""

    plan: MemoryPlan
    planned: int
    cache: int
    streamed_before: int
    streamed: int = 0
    chosen: int = 0
    peak: int = 0

    def report(self) -> MemoryReport:
        """The numbers of the report."""
        return MemoryReport(
            cap_bytes=self.plan.cap,
            resident_bytes=self.plan.resident,
            slot_bytes=self.plan.slots,
            chosen_bytes=self.chosen,
            cache_bytes=self.cache,
            planned_bytes=self.planned,
            streamed_bytes=self.streamed,
            peak_bytes=self.peak,
        )
