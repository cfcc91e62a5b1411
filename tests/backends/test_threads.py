"""Threads that share what multiplies, attends and steps get what each would get alone.

Other Python threads run while a kernel computes, so nothing that a call writes may be shared.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from corematching.backends.cpu import native as n
from corematching.backends.kernels import FFNWeights, NeuronSets

THREADS, ROUNDS = 4, 40

pytestmark = pytest.mark.usefixtures("isa")


def run_together(calls):
    """Every call in threads of its own, again and again; all must give what they give alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over neurons are split, and so rounded, by threads
    expected = [call() for call in calls]

    def repeat(index):
        call, alone = calls[index % len(calls)], expected[index % len(calls)]
        return sum(not torch.equal(call(), alone) for _ in range(ROUNDS))

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            wrong = list(pool.map(repeat, range(THREADS)))
    finally:
        torch.set_num_threads(before)
    assert wrong == [0] * THREADS


def draw(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_products():
    gemm, weight = n.Gemm(), draw(192, 320)
    inputs = [draw(rows, 320) for rows in (200, 33, 97, 260)]
    run_together([lambda x=x: gemm.linear(x, weight, None) for x in inputs])
    gate = draw(192, 320)
    run_together([lambda x=x: gemm.gated(x, gate, weight, None, None, "silu") for x in inputs])


def test_attention():
    attention = n.PrefillAttention()
    inputs = [draw(1, 2, length, 64) for length in (200, 33, 97, 260)]
    run_together([lambda x=x: attention.attend(x, x, x, None, 0.5, True) for x in inputs])


def test_layers():
    names = ("q", "k", "v", "o", "gate", "up", "down")
    weights = {name: draw(64, 64) for name in names}
    norms = (n.Norm(1 + draw(64), 1e-5), n.Norm(1 + draw(64), 1e-5))
    layer = n.PrefillLayer(weights, norms, 32, "silu", 0.3, n.Scratch())
    inputs = [draw(1, length, 64) for length in (200, 33, 97, 260)]
    run_together([lambda x=x: layer.run(x, None, None, True).out for x in inputs])


def test_batches_of_several_sizes_on_one_choice():
    up = draw(160, 64, dtype=torch.float32)
    weights = FFNWeights(up, up.flip(0).contiguous(), up.roll(1, 0))
    plan = n.KERNEL.prepare(weights, NeuronSets(torch.arange(0, 160, 3)[None]))
    inputs = [draw(rows, 64, dtype=torch.float32) for rows in (1, 2, 5, 16)]
    run_together([lambda x=x: n.KERNEL.run(x, weights, plan) for x in inputs])


def test_steps_under_their_lock():
    d, size = 32, 8
    weights = [draw(d, d, dtype=torch.float32) for _ in range(4)]
    layer = n.LayerWeights(torch.ones(d), torch.ones(d), *weights)
    step = n.DecodeStep([layer], torch.ones(d), n.Shape(4, 4, size, 1e-5, 0.5))
    up = draw(48, d, dtype=torch.float32)
    plan = n.KERNEL.prepare_dense(FFNWeights(up, up, up), up.t().contiguous(), None)

    def make(batch, capacity):
        x, cos = draw(batch, d, dtype=torch.float32), torch.ones(batch, size)
        keys = torch.randn(2, batch, 4, capacity, size)

        def run():
            with step.lock:
                step.set_plans([plan], batch)
                step.set_buffer(keys)
                return step.run(x, cos, torch.zeros_like(cos), None, capacity)

        return run

    run_together([make(1, 40), make(3, 7), make(2, 90), make(5, 12)])
