"""The record of a run: times, counters and choices."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corematching.backends.traffic import Tally
from corematching.offload.memory import MemoryUse
from corematching.report import PathReport
from corematching.runtime.prefill.selection import Selection

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """The current time; on a GPU an event, without synchronization."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def seconds_between(start: Mark | None, end: Mark | None) -> float:
    """Seconds between two marks; 0 if one is missing."""
    if start is None or end is None:
        return 0.0
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass
class Record:
    """The record of one run: small tensors, read only for a report.

    Attributes
    ----------
    valid, image : Tensor
        (B, T) bool, the prompt's tokens without padding, and its image tokens.
    context : Tensor
        (B, 2) long, tokens in the cache before this prompt: seen and stored.
    selection : Selection
        The choices.
    counts : list of int
        Neurons of a decode step in each layer.
    number : int
        The run's number, under which a cache refers to it.
    continued : bool
        Whether the run continued from a filled cache.
    earlier : Record or None
        Of a continued turn: the record of the first turn, which holds the token choices.
    rows : list of int or None
        Of a continued turn: each row's row in the first turn.
    expand : int
        Rows per sample (beams, several answers).
    cached : bool
        Whether there is a cache.
    logit_rows : int
        Prompt tokens in the output projection.
    steps : int
        Decode steps.
    sequences : Tensor or None
        (B, T') long, the output of generate().
    prompt_width : int
        Prompt tokens at the front of the sequences.
    ends : tuple of int
        End-of-sequence tokens.
    start, filled, last : Mark or None
        Begin and end of the prompt, end of the last decode step.
    vision : list of (Mark, Mark)
        Begin and end of each call of the vision tower.
    vision_flops : int
        FLOPs of these calls.
    vision_inside : bool
        Whether these calls lie between ``start`` and ``filled``.
    tally : Tally or None
        The counters at the end of the prompt.
    counted : int
        Decode steps that `kernel`, bytes and `path` cover; -1 before the first count.
    kernel : str
        The code that ran the decode steps.
    decode_bytes, dense_decode_bytes : int
        Weight bytes of a decode step, with the chosen and with all neurons.
    memory : MemoryUse or None
        Memory of a run under a cap.
    path : PathReport
        How often the backend's own code ran.
    """

    valid: Tensor
    image: Tensor
    context: Tensor
    selection: Selection
    counts: list[int]
    number: int = 0
    continued: bool = False
    earlier: Record | None = None
    rows: list[int] | None = None
    expand: int = 1
    cached: bool = False
    logit_rows: int = 1
    steps: int = 0
    sequences: Tensor | None = None
    prompt_width: int = 0
    ends: tuple[int, ...] = ()
    start: Mark | None = None
    filled: Mark | None = None
    last: Mark | None = None
    vision: list[tuple[Mark, Mark]] = field(default_factory=list)
    vision_flops: int = 0
    vision_inside: bool = False
    tally: Tally | None = None
    counted: int = -1
    kernel: str = "torch"
    decode_bytes: int = 0
    dense_decode_bytes: int = 0
    memory: MemoryUse | None = None
    path: PathReport = field(default_factory=PathReport)

    @property
    def chooser(self) -> Record:
        """The record with the token choices: of a continued turn, the first turn's."""
        return self if self.earlier is None else self.earlier.chooser
