"""What the kernels are handed is checked: a wrong tensor is refused, or what comes out is right.

Every case (native_cases.py) gets one of its tensors changed in dtype, shape, layout or values. The
kernel must raise InvalidTensorError, say that it cannot run (None), or agree with float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corematching.backends.cpu import native as n
from corematching.backends.kernels import FFNWeights, NeuronSets, Thresholds
from corematching.errors import InvalidTensorError
from tests.backends.native_cases import MAKERS, Draw, is_close

pytestmark = pytest.mark.skipif(n.find_kernels() is None, reason="no compiled kernels")
DTYPES = [torch.float64, torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.long]


def _strided(x):
    """The same numbers, every second one of other memory."""
    return torch.stack([x, x], -1)[..., 0]


def _longer(x, axis):
    return torch.cat([x, x.narrow(axis, 0, 1)], axis)


def _change(x, how, where):
    if how == "dtype":
        return x.to(DTYPES[where % len(DTYPES)])
    if how == "bool":
        return x.bool()
    if how == "strided":
        return _strided(x)
    if how == "flat":
        return x.flatten()
    if how == "more dimensions":
        return x[None]
    axis = where % x.ndim
    if how == "empty":
        return x.narrow(axis, 0, 0)
    if how == "shorter":
        return x.narrow(axis, 0, x.shape[axis] - 1)
    if how == "longer":
        return _longer(x, axis)
    return x.transpose(axis, -1)


CHANGES = [*"dtype bool strided flat empty shorter longer transposed".split(), "more dimensions"]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
@settings(max_examples=40, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.integers(0, 30),
    how=st.sampled_from(CHANGES),
    where=st.integers(0, 11),
)
def test_a_changed_tensor_is_refused_or_right(maker, seed, name, how, where):
    case = maker(Draw(seed))
    there = [key for key, x in case.tensors.items() if x is not None]
    key = there[name % len(there)]
    tensors = {**case.tensors, key: _change(case.tensors[key], how, where)}
    try:
        ours = case.call(**tensors)
    except InvalidTensorError as error:
        assert len(str(error)) < 400
        return
    if ours is not None:
        assert is_close(case, ours, case.reference(**tensors)), (case.name, key, how)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda m: m.__name__)
@settings(max_examples=10, derandomize=True, database=None)
@given(seed=st.integers(0, 10_000), value=st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38]))
def test_what_is_no_number_harms_nothing(maker, seed, value):
    """NaN and infinity go through: shapes stay, and other samples' numbers too."""
    case = maker(Draw(seed))
    for key, x in case.tensors.items():
        if x is not None and x.is_floating_point():
            places = torch.arange(x.numel()).view(x.shape) % max(x.numel() // 3, 1) == 0
            x = x.clone().masked_fill_(places, value)
            ours = case.call(**{**case.tensors, key: x})
            assert ours is None or all(isinstance(out, torch.Tensor) for out in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan_when_it_is_rounded(dtype):
    x, weight = torch.randn(2, 40).to(dtype), torch.randn(9, 40).to(dtype)
    x[1, 3] = torch.nan
    for out in (n.linear(x, weight, None), n.Gemm().linear(x, weight, None)):
        assert out[1].isnan().all() and not out[0].isnan().any()
    for name in ("silu", "gelu", "gelu_tanh", "relu"):
        weights = FFNWeights(weight, weight.clone(), activation=name)
        plan = n.KERNEL.prepare(weights, NeuronSets(torch.tensor([[0, 5, 8]])))
        out = n.KERNEL.run(x, weights, plan)
        assert out[1].isnan().all() and not out[0].isnan().any()
    x[1, 3] = torch.inf
    assert n.linear(x, weight.abs(), None)[1].eq(torch.inf).all()


@pytest.fixture
def weights():
    up = torch.randn(6, 8)
    return FFNWeights(up, up.clone())


@pytest.mark.parametrize("index", [6, -1, 2**40, -(2**40)])
def test_a_neuron_that_is_not_there(weights, index):
    sets = NeuronSets(torch.tensor([[0, 1]]))
    sets.indices[0, 0 if index < 0 else 1] = index
    with pytest.raises(InvalidTensorError, match="ascend"):
        n.KERNEL.run(torch.randn(1, 8), weights, n.KERNEL.prepare(weights, sets))


@pytest.mark.parametrize("rows, sets", [(0, 1), (17, 1), (3, 2), (1, 2), (32, 32)])
def test_a_batch_that_does_not_fit(weights, rows, sets):
    plan = n.KERNEL.prepare(weights, NeuronSets(torch.tensor([[0, 1]]).expand(sets, 2)))
    with pytest.raises(InvalidTensorError, match=r"rows|shape"):
        n.KERNEL.run(torch.randn(rows, 8), weights, plan)


def test_a_threshold_for_every_set(weights):
    for name in ("input", "gate", "output"):
        limits = Thresholds(**{name: torch.zeros(3)})
        with pytest.raises(InvalidTensorError, match=f"the {name} thresholds"):
            n.KERNEL.prepare(weights, NeuronSets(torch.tensor([[0, 1], [2, 3]]), None, limits))


@pytest.mark.parametrize("rows", [0, 17])
def test_a_linear_layer_for_too_many_rows(rows):
    with pytest.raises(InvalidTensorError, match="1 to 16 rows"):
        n.linear(torch.randn(rows, 8), torch.randn(3, 8), None)


def test_more_matrices_than_are_multiplied_at_once():
    gemm, x = n.Gemm(), torch.randn(5, 8)
    with pytest.raises(InvalidTensorError, match="1 to 4"):
        gemm.joint(x, [torch.randn(3, 8)] * 5, [None] * 5)
    with pytest.raises(InvalidTensorError, match="1 to 4"):
        gemm.joint(x, [torch.randn(3, 8)] * 2, [None])


def test_no_rows_give_no_rows(isa):
    gemm, weight = n.Gemm(), torch.randn(64, 32).bfloat16()
    x = torch.randn(0, 32).bfloat16()
    assert gemm.linear(x, weight, None).shape == (0, 64)
    assert gemm.gated(x, weight, weight, None, None, "silu").shape == (0, 64)
    assert gemm.joint(x, [weight, weight], [None, None]).shape == (0, 128)
    assert n.normalize(x, n.Norm(torch.ones(32).bfloat16(), 1e-5)).shape == (0, 32)


def make_step(capacity=5, batch=2):
    d, size = 8, 4
    layer = n.LayerWeights(torch.ones(d), torch.ones(d), *(torch.eye(d) for _ in range(4)))
    step = n.DecodeStep([layer], torch.ones(d), n.Shape(2, 2, size, 1e-5, 0.5))
    up = torch.randn(6, d)
    step.set_plans([n.KERNEL.prepare_dense(FFNWeights(up, up), up.t().contiguous(), None)], batch)
    step.set_buffer(torch.zeros(2, batch, 2, capacity, size))
    return step, [torch.randn(batch, d), torch.ones(batch, size), torch.zeros(batch, size)]


@pytest.mark.parametrize("length", [0, -1, 6, 2**40])
def test_a_length_beyond_the_buffer(length):
    step, inputs = make_step()
    assert step.run(*inputs, None, 5).shape == (2, 8)
    with pytest.raises(InvalidTensorError, match="does not fit a buffer"):
        step.run(*inputs, None, length)


@pytest.mark.parametrize("lengths", [[0, 5], [5, 6], [5], [[5, 5]], [1.0, 2.0]])
def test_lengths_of_rows_that_do_not_fit(lengths):
    step, inputs = make_step()
    with pytest.raises(InvalidTensorError):
        step.run(*inputs, None, torch.tensor(lengths))


@pytest.mark.parametrize("columns", [3, 0])
def test_fewer_valid_columns_than_the_longest_row_has(columns):
    step, inputs = make_step()
    valid = torch.ones(2, columns, dtype=torch.uint8)
    with pytest.raises(InvalidTensorError, match="valid columns"):
        step.run(*inputs, valid, torch.tensor([2, 4]))


def test_steps_of_other_rows_than_the_buffer_has():
    step, inputs = make_step()
    up = torch.randn(6, 8)
    step.set_plans([n.KERNEL.prepare_dense(FFNWeights(up, up), up.t().contiguous(), None)], 3)
    with pytest.raises(InvalidTensorError, match="does not fit a buffer"):
        step.run(*inputs, None, 5)
    with pytest.raises(InvalidTensorError, match="1 to 16 rows"):
        step.set_plans([n.KERNEL.prepare_dense(FFNWeights(up, up), up.t().contiguous(), None)], 17)


@pytest.mark.parametrize("slot", [2, 10**6])
def test_a_gate_kept_beyond_its_room(slot):
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    kept = torch.tensor([0, -1, slot], dtype=torch.int32), torch.zeros(2, 6)
    with pytest.raises(InvalidTensorError, match="slot"):
        n.Gemm().gated(x, weight, weight, None, None, "silu", kept)


@pytest.mark.parametrize(
    "call",
    [
        lambda: n.mark_highest(torch.rand(1, 2, 4), torch.tensor([[[0], [1]]]), False),
        lambda: n.mark_highest(torch.rand(1, 2, 4), torch.tensor([[[5], [1]]]), False),
        lambda: n.pick_highest(torch.rand(1, 4), 5),
        lambda: n.pick_highest(torch.rand(1, 4), -1),
        lambda: find(neurons=torch.tensor([[0, 4]])),
        lambda: find(neurons=torch.tensor([[-1, 3]])),
        lambda: find(ranks=torch.tensor([9])),
        lambda: find(ranks=torch.tensor([-1])),
    ],
)
def test_counts_ranks_and_neurons_that_are_not_there(call):
    with pytest.raises(InvalidTensorError):
        call()


def find(neurons=None, ranks=None):
    values, tokens = torch.rand(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    return n.find_size(values, tokens, neurons, torch.tensor([1]) if ranks is None else ranks)
