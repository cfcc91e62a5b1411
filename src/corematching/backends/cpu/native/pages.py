"""Large memory pages under the weights: translating addresses is part of what reading costs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from corematching.backends.cpu.native.library import compiled, find_kernels

GAP = 1 << 16
"""Bytes between two tensors that still count as one range; allocators leave headers and padding."""


def use_large_pages(tensors: Iterable[Tensor]) -> int:
    """Put these tensors' memory on large pages, where the system has them.

    Addresses and values stay as they are. Tensors that follow each other in memory share pages.

    Returns
    -------
    int
        Bytes that now lie on large pages; 0 where the system knows none.
    """
    if find_kernels() is None:
        return 0
    spans = sorted({(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes >= GAP})
    total, start, end = 0, 0, 0
    for first, last in spans:
        if first - end > GAP:
            total += compiled.use_large_pages(start, end)
            start = first
        end = max(end, last)
    return total + compiled.use_large_pages(start, end)


def leave_file(parameters: Iterable[Parameter]) -> int:
    """Bring parameters that are mapped from a file into memory, which can have large pages.

    They stay the same parameters with the same values; the file's pages are the system's to reuse.
    Does nothing where that would take more than half of the free memory.

    Returns
    -------
    int
        Bytes brought in.
    """
    starts, ends = _file_ranges()
    mapped = []
    for parameter in parameters:
        place = bisect_right(starts, parameter.data_ptr()) - 1
        if place >= 0 and parameter.data_ptr() < ends[place]:
            mapped.append(parameter)
    total = sum(p.nbytes for p in mapped)
    if not total or total > _free_memory() // 2:
        return 0
    with torch.inference_mode(False), torch.no_grad():
        for parameter in mapped:
            parameter.data = parameter.data.clone()
    return total


def _free_memory() -> int:
    """Bytes of memory that new allocations can have; 0 if not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    kilobytes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(next(kilobytes, 0))


def _file_ranges() -> tuple[list[int], list[int]]:
    """Where this process has files in its memory, from and to, ascending; empty if not known."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return [], []
    spans = [line.split()[0].split("-") for line in lines if "/" in line.split(maxsplit=5)[-1][:1]]
    ranges = sorted((int(start, 16), int(end, 16)) for start, end in spans)
    return [start for start, _ in ranges], [end for _, end in ranges]
