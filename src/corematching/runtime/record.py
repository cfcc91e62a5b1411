"""What a run leaves behind: times, counters, and what was chosen."""

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
    """This moment; on a GPU an event, which waits for nothing."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def seconds_between(start: Mark | None, end: Mark | None) -> float:
    """Seconds from one mark to another; 0 if one is missing."""
    if start is None or end is None:
        return 0.0
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass
class Record:
    """What one run leaves behind; small tensors, read only when a report is asked for.

    Attributes
    ----------
    valid, image : Tensor
        (B, T) bool, the prompt's tokens that are no padding, and its image tokens.
    context : Tensor
        (B, 2) long, tokens in the cache before this prompt: as seen and as stored.
    selection : Selection
        What was chosen.
    counts : list of int
        Neurons that a decode step computes in each layer.
    number : int
        The run's number, by which a cache names it.
    continued : bool
        Whether the run went on from a cache that held something.
    earlier : Record or None
        Of a continued turn: the record of the first one, which holds the choices of tokens.
    rows : list of int or None
        Of a continued turn: the row of the first one that each row goes on from.
    expand : int
        Rows of each sample, as beam search makes them.
    cached : bool
        Whether there is a cache.
    logit_rows : int
        Tokens of the prompt that the output projection ran for.
    steps : int
        Decode steps.
    sequences : Tensor or None
        (B, T') long, what generate() gave.
    prompt_width : int
        Tokens of the prompt at their front.
    ends : tuple of int
        End-of-sequence tokens.
    start, filled, last : Mark or None
        Begin and end of the prompt, end of the last decode step.
    vision : list of (Mark, Mark)
        Begin and end of each call of the vision tower.
    vision_flops : int
        What these calls cost.
    vision_inside : bool
        Whether they lie between ``start`` and ``filled``.
    tally : Tally or None
        The counters at the end of the prompt.
    settled : int
        Decode steps that `kernel`, bytes and `path` cover; -1: none was looked at.
    kernel : str
        What ran the decode steps.
    decode_bytes, dense_decode_bytes : int
        Bytes of weights that a decode step read, and would with all neurons.
    memory : MemoryUse or None
        What was taken of the memory, where it had a cap.
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
    settled: int = -1
    kernel: str = "torch"
    decode_bytes: int = 0
    dense_decode_bytes: int = 0
    memory: MemoryUse | None = None
    path: PathReport = field(default_factory=PathReport)

    @property
    def chooser(self) -> Record:
        """The record that holds the choices of tokens: of a continued turn, the first one's."""
        return self if self.earlier is None else self.earlier.chooser
