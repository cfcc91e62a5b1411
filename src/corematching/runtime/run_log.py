"""The records of a model's last runs and their final counters."""

from __future__ import annotations

import itertools
from collections import deque

from corematching.runtime.installation import Installation
from corematching.runtime.record import Mark, Record, mark

MAX_RECORDS = 16
FIRST_NUMBERS = itertools.count(0, 1 << 32)
"""First record number of each session, so that a cache never names another session's record."""


class RunLog:
    """Keeps the last records; the latest one is open and counts decode steps."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)
        self.number = next(FIRST_NUMBERS)
        self._open: tuple[Record, Installation] | None = None

    def add(self, record: Record, installation: Installation, start: Mark | None) -> None:
        """Add the record of a prompt that began at ``start`` and has ended now."""
        if self._open is not None:
            self.close(self._open[0])
        self._open, record.tally = (record, installation), installation.traffic.tally()
        record.memory = None if installation.offload is None else installation.offload.use
        record.number, self.number = self.number, self.number + 1
        record.start, record.filled = start, mark(installation.device)
        record.last = record.filled
        record.vision, record.vision_flops = installation.vision.take()
        if self.records:
            self.records[-1].selection.forget_neurons()
        self.records.append(record)

    def find(self, number: int) -> Record | None:
        """The record with this number, or None if it is no longer kept."""
        return next((r for r in self.records if r.number == number and number >= 0), None)

    def count_step(self) -> None:
        """Count one decode step of a hand-written loop."""
        if self.records and self._open is not None:
            self.records[-1].steps += 1
            self.records[-1].last = mark(self._open[1].device)

    def close(self, record: Record) -> None:
        """Note the latest record's decode counters; may be called repeatedly."""
        if self._open is None or record is not self._open[0] or record.tally is None:
            return
        if record.counted == record.steps:
            return
        installation = self._open[1]
        record.counted = record.steps
        if installation.offload is not None:
            installation.offload.measure(record.memory)
        now, before, rows = installation.traffic.tally(), record.tally, len(record.valid)
        record.path.native_steps = now.stats.native_steps - before.stats.native_steps
        record.path.graph_replays = now.stats.graph_replays - before.stats.graph_replays
        record.kernel = installation.traffic.name(before, now)
        record.decode_bytes = installation.traffic.bytes_per_step(before, now, record.steps, rows)
        record.dense_decode_bytes = installation.traffic.dense_bytes()
