"""The sources of weights outside fast memory: files, or pinned host memory.

Files are read into existing buffers and dropped from the page cache at once. With mmap, the kernel
would decide how much memory a file takes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor, nn

from corematching.directories import cache_root
from corematching.errors import InputError
from corematching.sizes import format_size

CHUNK = 8 << 20
SPARE_BYTES = 64 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Source(Protocol):
    """One weight in slow memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def copy_to(self, out: Tensor) -> None:
        """Copy the weight into a contiguous tensor of its shape and any floating dtype."""
        ...


class WeightFile:
    """An open file of weights, for one thread at a time.

    It has no lock, which an interrupt could leave closed.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from ``offset`` on, and drop the pages from the page cache.

        Raises
        ------
        InputError
            The file is too short.
        """
        done = 0
        while done < len(into):
            self.file.seek(offset + done)
            count = self.file.readinto(into[done : done + CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise InputError(
                    f"{self.name} ends before its weights do: download the model again"
                )
            done += count
            forget_pages(self.file.fileno(), offset + done)
        self.forget()

    def forget(self) -> None:
        """Drop the file from the page cache."""
        forget_pages(self.file.fileno())


def forget_pages(descriptor: int, end: int = 0) -> None:
    """Drop a file's first ``end`` bytes (0: all of it) from the page cache.

    Always from the start: the kernel keeps a large page that a range covers only in part.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, end, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class FileSource:
    """A weight in a file."""

    file: WeightFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def copy_to(self, out: Tensor) -> None:
        """Read the weight; another dtype is converted in chunks."""
        flat = out.view(-1)
        if out.dtype == self.dtype:
            self.file.read(self.offset, _raw(flat))
            return
        step = CHUNK // self.dtype.itemsize
        buffer = torch.empty(min(step, flat.numel()), dtype=self.dtype)
        for start in range(0, flat.numel(), step):
            piece = buffer[: flat.numel() - start]
            offset = self.offset + start * self.dtype.itemsize
            self.file.read(offset, _raw(piece))
            flat[start : start + step].copy_(piece)


@dataclass(frozen=True)
class HostSource:
    """A weight in host memory, pinned for GPUs."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.tensor.shape)

    def copy_to(self, out: Tensor) -> None:
        """Copy the weight; to a GPU asynchronously in the current stream."""
        out.copy_(self.tensor, non_blocking=True)


def pin(weight: Tensor | Source, dtype: torch.dtype) -> HostSource:
    """Copy a weight into pinned host memory."""
    shape = tuple(weight.shape)
    host = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    if isinstance(weight, Tensor):
        host.copy_(weight.detach())
    else:
        weight.copy_to(host)
    return HostSource(host)


class Scratch:
    """An unnamed file in the cache directory; the system removes it when it is closed.

    Parameters
    ----------
    size : int
        Bytes that will be written.

    Raises
    ------
    InputError
        The disk has no room for it.
    """

    def __init__(self, size: int) -> None:
        directory = cache_root()
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        if free < size + SPARE_BYTES:
            raise InputError(
                f"{directory} has {format_size(free)} left, but the weights that leave the memory "
                f"take {format_size(size)}: free some, point CORE_MATCHING_CACHE at a larger disk, "
                "or use load(path, memory=...), which reads them from the model's own files"
            )
        raw = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self._file = WeightFile(raw, str(directory))
        self._end = 0

    def write(self, weights: Iterable[nn.Parameter]) -> list[FileSource]:
        """Append weights and flush them to the disk."""
        raw, sources = self._file.file, []
        for weight in weights:
            data = weight.detach().cpu().contiguous()
            sources.append(FileSource(self._file, self._end, tuple(data.shape), data.dtype))
            view = _raw(data)
            raw.seek(self._end)
            done = 0
            while done < len(view):
                done += raw.write(view[done : done + CHUNK])
            self._end += done
        os.fsync(raw.fileno())
        forget_pages(raw.fileno())
        return sources

    def close(self) -> None:
        """Close the file, which frees its disk space."""
        self._file.file.close()


def open_checkpoint(paths: Iterable[str | Path]) -> dict[tuple[str, str], FileSource]:
    """The floating-point weights of safetensors files, by file and name.

    Raises
    ------
    InputError
        A file is no safetensors file.
    """
    found: dict[tuple[str, str], FileSource] = {}
    for path in paths:
        raw = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        except (ValueError, UnicodeDecodeError, MemoryError, OverflowError) as error:
            raw.close()
            raise InputError(f"{path} is no safetensors file: download the model again") from error
        file = WeightFile(raw, str(path))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] in DTYPES:
                offset = 8 + length + entry["data_offsets"][0]
                shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
                found[str(path), name] = FileSource(file, offset, shape, dtype)
    return found


def _raw(tensor: Tensor) -> memoryview:
    """The writable bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
