"""The compiled kernels compute what PyTorch's operators do, and read no more than they must."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from corematching.backends.cpu.native import KERNEL, linear
from corematching.backends.kernels import (
    CompactWeights,
    FFNWeights,
    NeuronSets,
    Thresholds,
    activation_name,
    sparse_ffn,
)

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_weights(
    width=50, hidden=37, gated=True, bias=True, activation="silu", dtype=torch.float32
):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=rng) / shape[-1] ** 0.5).to(dtype)

    return FFNWeights(
        up=draw(width, hidden),
        down_t=draw(width, hidden),
        gate=draw(width, hidden) if gated else None,
        up_bias=draw(width) if bias else None,
        gate_bias=draw(width) if bias and gated else None,
        activation=activation,
    )


def choose(sets, width=50, count=20, seed=1):
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(width, generator=rng)[:count].sort().values for _ in range(sets)]
    return torch.stack(rows)


def reference(x, weights, sets):
    """The same in float32 with PyTorch's operators, on copies."""

    def pick(tensor):
        return None if tensor is None else tensor.float()[sets.indices]

    compact = CompactWeights(
        up=pick(weights.up),
        down=pick(weights.down_t).transpose(1, 2),
        gate=pick(weights.gate),
        up_bias=pick(weights.up_bias),
        gate_bias=pick(weights.gate_bias),
    )
    bias = None if sets.bias is None else sets.bias.float()
    return sparse_ffn(x.float(), compact, bias, FUNCTIONS[weights.activation], sets.thresholds)


def assert_same(x, weights, sets, tolerance=None):
    ours = KERNEL.run(x, weights, KERNEL.prepare(weights, sets))
    assert ours.dtype == x.dtype
    tolerance = tolerance or TOLERANCE[x.dtype]
    theirs = reference(x, weights, sets)
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_form(activation, gated, bias, dtype):
    weights = make_weights(gated=gated, bias=bias, activation=activation, dtype=dtype)
    extra = torch.randn(2, 37).to(dtype) if bias else None
    x = torch.randn(4, 37).to(dtype)
    assert_same(x, weights, NeuronSets(choose(2), extra))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch, sets", [(1, 1), (2, 2), (3, 1), (6, 3), (8, 8), (13, 1), (16, 4)])
@pytest.mark.parametrize("hidden, width", [(64, 96), (31, 18), (160, 7)])
def test_every_batch(batch, sets, hidden, width, dtype):
    weights = make_weights(width, hidden, dtype=dtype)
    chosen = choose(sets, width, max(1, width // 3))
    assert_same(torch.randn(batch, hidden).to(dtype), weights, NeuronSets(chosen))


@pytest.mark.parametrize("count", [1, 2, 5, 50])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_share_of_threads(count, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sets = NeuronSets(choose(2, count=count))
        assert_same(torch.randn(2, 37), make_weights(), sets)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", ["input", "gate", "output"])
@pytest.mark.parametrize("batch, sets", [(1, 1), (4, 2), (3, 3)])
def test_thresholds(batch, sets, rule, gated):
    if rule == "gate" and not gated:
        pytest.skip("there is no gate")
    weights = make_weights(gated=gated)
    limits = Thresholds(**{rule: torch.linspace(0.05, 0.2, sets)})
    assert_same(torch.randn(batch, 37), weights, NeuronSets(choose(sets), None, limits))


def test_large_inputs_do_not_overflow():
    x = 1e4 * torch.randn(2, 37)
    for activation in FUNCTIONS:
        weights, sets = make_weights(activation=activation, bias=False), NeuronSets(choose(1))
        ours = KERNEL.run(x, weights, KERNEL.prepare(weights, sets))
        torch.testing.assert_close(ours, reference(x, weights, sets), rtol=1e-3, atol=1.0)


def test_reads_every_row_of_the_union_once():
    weights, row = make_weights(), 37 * 4
    chosen = choose(3)
    plan = KERNEL.prepare(weights, NeuronSets(chosen))
    KERNEL.run(torch.randn(3, 37), weights, plan)
    union = chosen.unique().numel()
    assert plan.rows_read.tolist() == [union] * 3
    assert plan.bytes_read() == 3 * union * row <= 3 * 50 * row
    again = KERNEL.prepare(weights, NeuronSets(chosen[:1]), plan)
    KERNEL.run(torch.randn(1, 37), weights, again)
    assert again.rows_read.tolist() == [union + 20] * 3


@pytest.mark.parametrize("rule, skipped", [("gate", (1, 2)), ("output", (2,))])
def test_skips_the_rows_that_no_sample_wants(rule, skipped):
    weights, x = make_weights(), torch.randn(2, 37)
    limit = torch.full((1,), 0.4)
    plan = KERNEL.prepare(weights, NeuronSets(choose(1), None, Thresholds(**{rule: limit})))
    KERNEL.run(x, weights, plan)
    read = plan.rows_read.tolist()
    chosen = choose(1)[0]
    kept = F.silu(x @ weights.gate[chosen].T + weights.gate_bias[chosen])
    if rule == "output":
        kept = kept * (x @ weights.up[chosen].T + weights.up_bias[chosen])
    wanted = int((kept.abs() >= 0.4).any(0).sum())
    assert 0 < wanted < 20
    assert read == [wanted if i in skipped else 20 for i in range(3)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_linear_layers(batch, bias, dtype):
    layer = torch.nn.Linear(41, 70, bias=bias).to(dtype)
    x = torch.randn(batch, 41).to(dtype)
    with torch.no_grad():
        theirs = F.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
        ours = linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours.float(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: FFNWeights(w.up.double(), w.down_t.double()), "float64"),
        (lambda w: FFNWeights(w.up.half(), w.down_t.half()), "float16"),
        (lambda w: FFNWeights(w.up[:, ::2], w.down_t[:, ::2]), "rows are not contiguous"),
        (lambda w: FFNWeights(w.up, w.down_t, activation=""), "does not know the activation"),
        (lambda w: FFNWeights(w.up.to("meta"), w.down_t.to("meta")), "on meta"),
    ],
)
def test_refuses_what_it_cannot_read(change, reason):
    assert reason in KERNEL.why_unsupported(change(make_weights()))


def test_finds_activation_functions_by_trying():
    for name, function in FUNCTIONS.items():
        assert activation_name(function) == name
    assert activation_name(torch.nn.SiLU()) == "silu"
    assert activation_name(torch.tanh) is None
    assert activation_name(lambda: None) is None
