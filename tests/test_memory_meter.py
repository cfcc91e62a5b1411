"""The process's memory, now and at most."""

import torch

from corematching.memory_meter import MemoryMeter

LEAST = 32 << 20
TRIES = 5
"""The system may take cold pages of the process away while a block of 64 MiB is written."""


def use_a_block():
    """A meter that has seen a block of 64 MiB, and the bytes in use before it."""
    meter = MemoryMeter(torch.device("cpu"))
    meter.reset()
    before = meter.used
    block = torch.ones(16 << 20)
    del block
    return meter, before


def test_peak_memory_sees_what_was_freed():
    uses = (use_a_block() for _ in range(TRIES))
    assert any(meter.peak - before > LEAST for meter, before in uses)


def test_the_peak_of_a_model_is_its_own_bytes_and_the_growth():
    uses = (use_a_block() for _ in range(TRIES))
    assert any(LEAST < meter.peak_with(1000) - 1000 < meter.peak for meter, _ in uses)
