"""The weight bytes of decode steps, from the counters of backend and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from corematching.backends.base import Backend, BackendStats


@dataclass(frozen=True)
class Tally:
    """Counters at one moment.

    Attributes
    ----------
    read : list of int
        Bytes of FFN weights that kernels have read, by layer.
    stats : BackendStats
        The backend's counters.
    """

    read: list[int]
    stats: BackendStats


class WeightTraffic:
    """Counts the weight bytes of a model's decode steps.

    Parameters
    ----------
    backend : Backend
        Runs the steps.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, parts = backend, backend.parts
        head: Any = backend.model.get_output_embeddings()  # type: ignore[operator]
        self._ffn_bytes = [_bytes_of(ffn) for ffn in parts.ffns]
        self._other_bytes = sum(map(_bytes_of, parts.attentions))
        self._other_bytes += 0 if head is None else _bytes_of(head)

    def tally(self) -> Tally:
        """The counters now."""
        stats, sparse = self.backend.stats(), self.backend.sparse
        read = [
            self.backend.dense_ffn_bytes(i) + (sparse[i].bytes_counted() if i in sparse else 0)
            for i in range(len(self._ffn_bytes))
        ]
        return Tally(read, stats)

    def name(self, before: Tally, after: Tally) -> str:
        """The code that ran the decode steps between two tallies."""
        ran = after.stats.steps > before.stats.steps
        return self.backend.describe(ran, after.read != before.read)

    def bytes_per_step(self, before: Tally, after: Tally, steps: int, batch: int) -> int:
        """Weight bytes per step between two tallies: attention, FFNs, output projection.

        Without a kernel's count, the bytes that the operators must read.
        """
        total = self._other_bytes
        for index, dense in enumerate(self._ffn_bytes):
            read = after.read[index] - before.read[index]
            if read and steps:
                total += round(read / steps)
            elif index in self.backend.sparse:
                total += self.backend.sparse[index].bytes_read(batch)
            else:
                total += dense
        return total

    def dense_bytes(self) -> int:
        """Weight bytes per step with all neurons."""
        return self._other_bytes + sum(self._ffn_bytes)


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
