"""The process's memory, now and at most."""

import torch

from corematching.memory_meter import MemoryMeter


def test_peak_memory_sees_what_was_freed():
    meter = MemoryMeter(torch.device("cpu"))
    meter.reset()
    before = meter.used
    block = torch.ones(16 << 20)  # 64 MiB
    del block
    assert meter.peak - before > 32 << 20


def test_the_peak_of_a_model_is_its_own_bytes_and_the_growth():
    meter = MemoryMeter(torch.device("cpu"))
    meter.reset()
    block = torch.ones(16 << 20)
    del block
    assert 32 << 20 < meter.peak_with(1000) - 1000 < meter.peak
