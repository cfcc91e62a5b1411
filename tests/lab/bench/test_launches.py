"""The counter of launches and waits, on operators whose numbers are known."""

import numpy as np
import torch

from corematching import devices
from corematching.devices import HostCopy
from corematching.lab.bench.launches import LaunchCounter


def counted(work):
    counter = LaunchCounter()
    with torch.no_grad(), counter.counting():
        work()
    return counter


def test_views_and_allocations_are_no_launches():
    x = torch.randn(4, 6)
    counter = counted(lambda: (x.t()[1:].unsqueeze(0), torch.empty(3), x.view(2, 12).expand(2, 12)))
    assert not counter.launches and not counter.waits


def test_operators_and_copies_are_launches():
    x = torch.randn(4, 6)

    def work():
        (x @ x.t()).relu_()
        devices.upload(np.zeros(3), x.device)
        HostCopy(x).read()

    counter = counted(work)
    assert counter.launches == {"mm": 1, "relu_": 1, "upload": 1, "copy to host": 1}
    assert not counter.waits


def test_reads_are_waits():
    x, mask = torch.randn(4), torch.tensor([True, False, True, True])
    for work in (
        lambda: x.sum().item(),
        lambda: bool(mask[0]),
        lambda: mask.nonzero(),
        lambda: x[mask],
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: torch.equal(x, x),
    ):
        assert counted(work).waits.total() == 1
