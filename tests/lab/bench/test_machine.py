"""How busy the machine is, and what is refused then."""

from __future__ import annotations

import pytest
import torch

from corematching.errors import BusyMachineError
from corematching.lab.bench.machine import (
    Ceilings,
    CpuMeter,
    best_seconds,
    grow_product,
    measure_ceilings,
    require_quiet,
)


def test_a_busy_machine_is_refused_with_the_way_out():
    with pytest.raises(BusyMachineError, match=r"87%.*--force"):
        require_quiet(lambda: 0.87)


def test_force_and_a_quiet_machine_go_on():
    assert require_quiet(lambda: 0.87, force=True) == 0.87
    assert require_quiet(lambda: 0.1) == 0.1


def test_own_work_is_not_others(monkeypatch):
    readings = iter([(10.0, 4.0, 100.0), (16.0, 9.0, 110.0)])
    monkeypatch.setattr(CpuMeter, "_read", staticmethod(lambda: next(readings)))
    # 6 busy seconds, 5 of them ours, out of 10
    assert CpuMeter().ratio() == pytest.approx(0.1)


def test_ceilings_count_both_directions_and_two_per_multiply_add(monkeypatch):
    from corematching.lab.bench import machine

    monkeypatch.setattr(machine, "best_seconds", lambda *arguments: 0.5)
    measured = measure_ceilings(torch.device("cpu"), torch.float32)
    assert measured == Ceilings(2 * 2**28 / 0.5, 2 * 256**3 / 0.5, "float32")


def test_products_grow_until_they_take_long_enough(monkeypatch):
    from corematching.lab.bench import machine

    seconds = iter([0.01, 0.02, 0.2])
    monkeypatch.setattr(machine, "best_seconds", lambda *arguments: next(seconds))
    cpu = torch.device("cpu")
    assert grow_product(cpu, torch.float32, 2048)[0] == 1024
    seconds = iter([0.01] * 9)
    assert grow_product(cpu, torch.float32, 512)[0] == 512


def test_best_of_at_least_five():
    runs = []
    assert best_seconds(lambda: runs.append(1), torch.device("cpu"), least=0.0) >= 0
    assert len(runs) == 6  # the first one is not timed
