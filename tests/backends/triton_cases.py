"""The Triton FFN against PyTorch; `test_triton.py` runs this file in a process of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corematching.backends.cuda.triton_ffn import KERNEL
from corematching.backends.kernels import select
from corematching.backends.kernels.interface import NeuronSets, Thresholds
from corematching.backends.sparse_ffn import SparseFFN
from corematching.errors import ConfigError
from corematching.model.ffn_weights import FFNWeights
from corematching.protocol import NeuronChoice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_ffn(width, hidden, dtype=torch.float32, gated=True, biased=False, activation="silu"):
    generator = torch.Generator().manual_seed(width + hidden)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)

    scale = hidden**-0.5
    return FFNWeights(
        up=random(width, hidden, scale=scale),
        gate=random(width, hidden, scale=scale) if gated else None,
        down_t=random(width, hidden),
        up_bias=random(width) if biased else None,
        gate_bias=random(width) if biased and gated else None,
        activation=activation,
    )


def random_tokens(batch, hidden, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, hidden, generator=generator).to(dtype).to(DEVICE)


def slow_ffn(x, weights, indices, bias, thresholds):
    """The definition, sample by sample, in float32; -1 among the indices is filler."""
    act, outs = ACTIVATIONS[weights.activation], []
    for b, token in enumerate(x.float()):
        s = b * len(indices) // len(x)
        chosen = indices[s][indices[s] >= 0].to(x.device)
        w = {
            name: tensor[chosen].float()
            for name, tensor in vars(weights).items()
            if isinstance(tensor, torch.Tensor)
        }
        if thresholds.input is not None:
            token = token * (token.abs() >= thresholds.input[s])
        values = w["up"] @ token + w.get("up_bias", 0)
        if "gate" in w:
            gates = act(w["gate"] @ token + w.get("gate_bias", 0))
            if thresholds.gate is not None:
                gates = gates * (gates.abs() >= thresholds.gate[s])
            values = gates * values
        else:
            values = act(values)
        if thresholds.output is not None:
            values = values * (values.abs() >= thresholds.output[s])
        out = values.to(x.dtype).float() @ w["down_t"]
        if bias is not None:
            out = out + bias[b * len(bias) // len(x)].float()
        outs.append(out)
    return torch.stack(outs).to(x.dtype)


def prepare(weights, indices, bias=None, previous=None, **thresholds):
    sets = NeuronSets(indices.to(DEVICE), bias, Thresholds(**thresholds))
    return KERNEL.prepare(weights, sets, previous)


def check(x, weights, indices, bias=None, **thresholds):
    """The kernel's output, after a comparison with `slow_ffn`."""
    assert KERNEL.why_unsupported(weights) is None
    ours = KERNEL.run(x, weights, prepare(weights, indices, bias, **thresholds))
    theirs = slow_ffn(x, weights, indices, bias, Thresholds(**thresholds))
    assert ours.dtype == x.dtype
    scale = float(theirs.float().abs().max())
    error = float((ours.float() - theirs.float()).abs().max())
    assert error <= TOLERANCE[x.dtype] * max(scale, 1e-3), (error, scale)
    return ours


def choose(sets, count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(width, generator=generator)[:count].sort().values for _ in range(sets)]
    return torch.stack(picks)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "batch"), [(True, 1), (False, 3)])
def test_activations(activation, gated, batch):
    weights = random_ffn(50, 40, gated=gated, activation=activation)
    check(random_tokens(batch, 40), weights, choose(1, 21, 50))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("batch", "sets"), [(1, 1), (4, 4)])
def test_dtypes_with_every_bias(dtype, gated, batch, sets):
    weights = random_ffn(50, 40, dtype, gated, biased=True)
    bias = random_tokens(sets, 40, dtype)
    check(random_tokens(batch, 40, dtype), weights, choose(sets, 20, 50), bias=bias)


@pytest.mark.parametrize(
    ("batch", "sets", "biases"),
    [(1, 1, 1), (2, 1, 2), (6, 2, 3), (6, 6, 1), (16, 16, 16), (17, 1, 1), (34, 17, 34)],
)
def test_sets_and_biases_of_a_batch(batch, sets, biases):
    bias = random_tokens(biases, 24)
    check(random_tokens(batch, 24), random_ffn(40, 24), choose(sets, 11, 40), bias=bias)


@pytest.mark.parametrize(
    ("hidden", "count"),
    [(1, 1), (1, 17), (31, 15), (31, 16), (32, 1), (32, 17), (33, 16), (33, 70), (100, 15)],
)
def test_sizes_that_are_no_multiple_of_a_block(hidden, count):
    weights = random_ffn(70, hidden)
    check(random_tokens(1, hidden), weights, choose(1, count, 70))
    check(random_tokens(2, hidden), weights, choose(2, count, 70))


def test_more_rows_than_one_split():
    weights = random_ffn(400, 24)
    for batch in (1, 2):
        check(random_tokens(batch, 24), weights, choose(batch, 301, 400))


@pytest.mark.parametrize("batch", [1, 3])
def test_ragged_sets(batch):
    indices = choose(batch, 9, 30)
    indices[0, 4:] = -1
    check(random_tokens(batch, 24), random_ffn(30, 24), indices)


def test_a_set_without_neurons_gives_the_bias():
    bias = random_tokens(1, 24)
    nothing = torch.full((1, 5), -1)
    out = check(random_tokens(1, 24), random_ffn(30, 24), nothing, bias=bias)
    assert torch.equal(out, bias)


@pytest.mark.parametrize("rule", ["input", "gate", "output"])
@pytest.mark.parametrize(("batch", "sets"), [(1, 1), (4, 1), (4, 2)])
def test_thresholds(rule, batch, sets):
    x, weights, indices = random_tokens(batch, 24), random_ffn(30, 24), choose(sets, 20, 30)
    least = torch.linspace(0.2, 0.4, sets).to(DEVICE)
    thresholded = check(x, weights, indices, **{rule: least})
    assert not torch.equal(thresholded, check(x, weights, indices))


def test_a_gate_threshold_needs_a_gate():
    with pytest.raises(ConfigError, match="threshold the output"):
        prepare(random_ffn(8, 4, gated=False), choose(1, 3, 8), gate=torch.zeros(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_are_not_listed_are_not_read(batch):
    weights, indices = random_ffn(30, 24), choose(1, 12, 30)
    unlisted = torch.ones(30, dtype=torch.bool).index_fill(0, indices[0], False).to(DEVICE)
    for matrix in (weights.up, weights.gate, weights.down_t):
        matrix[unlisted] = torch.nan
    check(random_tokens(batch, 24), weights, indices)


def test_a_set_is_blind_to_the_rows_of_another():
    x, indices = random_tokens(2, 24), torch.tensor([[0, 1, 2], [7, 8, 9]])
    weights = random_ffn(10, 24)
    before = check(x, weights, indices)
    weights.up[7:] *= 3
    after = check(x, weights, indices)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_equal_inputs_give_equal_bits():
    x, weights = random_tokens(5, 24), random_ffn(300, 24)
    plan = prepare(weights, choose(5, 100, 300))
    assert torch.equal(KERNEL.run(x, weights, plan), KERNEL.run(x, weights, plan))


def test_strided_weights():
    """Halves of a fused projection, and rows that are wider than the FFN."""
    own = random_ffn(30, 24)
    fused = torch.cat([own.gate, own.up])
    wide = torch.cat([own.down_t, own.down_t], dim=1)[:, :24]
    weights = FFNWeights(up=fused[30:], gate=fused[:30], down_t=wide)
    check(random_tokens(1, 24), weights, choose(1, 12, 30))


def test_refuses_columns():
    own = random_ffn(30, 24)
    weights = FFNWeights(up=own.up, gate=own.gate, down_t=own.down_t.t().contiguous().t())
    assert KERNEL.why_unsupported(weights) == "neurons that are no contiguous rows"


def test_refuses_other_dtypes():
    assert KERNEL.why_unsupported(random_ffn(4, 4, torch.float64)) == "weights in torch.float64"


def test_the_union_lists_each_neuron_once():
    plan = prepare(random_ffn(8, 4), torch.tensor([[1, 4, 6], [4, 5, -1]]))
    assert plan.rows.tolist() == [1, 4, 5, 6, -1, -1]
    assert plan.members[:, :4].tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]
    assert not plan.members[:, 4:].any()


def test_the_union_is_no_longer_than_the_width():
    plan = prepare(random_ffn(4, 4), torch.tensor([[0, 1, 2], [1, 2, 3]]))
    assert plan.rows.tolist() == [0, 1, 2, 3]


def test_the_next_choice_takes_the_place_of_the_last():
    weights, x = random_ffn(30, 24), random_tokens(2, 24)
    first = prepare(weights, choose(2, 12, 30), random_tokens(2, 24))
    indices, bias = choose(2, 12, 30, seed=1), random_tokens(2, 24) + 1
    second = prepare(weights, indices, bias, previous=first)
    addresses = [(t.data_ptr(), u.data_ptr()) for t, u in
                 zip((first.rows, first.members, first.bias),
                     (second.rows, second.members, second.bias), strict=True)]  # fmt: skip
    assert all(old == new for old, new in addresses)
    assert torch.equal(KERNEL.run(x, weights, second), check(x, weights, indices, bias))


@pytest.mark.parametrize("batch", [1, 4])
def test_compiles_without_a_graph_break(batch):
    x, weights = random_tokens(batch, 24), random_ffn(30, 24)
    plan = prepare(weights, choose(batch, 12, 30))

    def step(x):
        return KERNEL.run(x * 2, weights, plan) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))


def test_compiled_code_takes_all_but_the_token_as_lying_where_it_lies():
    """What a CUDA graph does not take so, it copies at each replay."""
    weights = random_ffn(30, 24, biased=True)
    plan = prepare(weights, choose(2, 12, 30), random_tokens(2, 24))
    moving = []

    def backend(graph, example_inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            if node.meta["tensor_dict"].get("_dynamo_static_input_type") is None:
                moving.append(node.name)
        return graph

    torch._dynamo.reset()
    x = random_tokens(2, 24)
    compiled = torch.compile(
        lambda x: KERNEL.run(x, weights, plan), fullgraph=True, backend=backend
    )
    compiled(x)
    assert len(moving) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_a_cuda_graph_replays_with_the_new_token_and_the_new_choice():
    x, weights = random_tokens(4, 64), random_ffn(300, 64)
    plan = prepare(weights, choose(4, 100, 300))
    KERNEL.run(x, weights, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL.run(x, weights, plan)
    x.mul_(2)
    prepare(weights, choose(4, 100, 300, seed=1), previous=plan)
    graph.replay()
    assert torch.equal(out, KERNEL.run(x, weights, plan))


class GatedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down_proj, self.act_fn = nn.Linear(40, 24), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_runtime_runs_it_in_place(batch, monkeypatch):
    monkeypatch.setitem(select.KERNELS, DEVICE, "corematching.backends.cuda.triton_ffn")
    torch.manual_seed(0)
    mlp = GatedFFN().eval().to(DEVICE)
    sparse = SparseFFN(mlp, 13, in_place=True)
    sparse.install()
    x, dense = random_tokens(batch, 24)[:, None], mlp.down_proj.weight.clone()
    for seed in (0, 1):
        mean = torch.rand(batch, 40, device=DEVICE)
        choice = NeuronChoice(choose(batch, 13, 40, seed).to(DEVICE), mean)
        with torch.inference_mode():
            sparse.take(choice)
            sparse.gather()
            ours = mlp(x)
        sparse.gather(copies=True)
        assert sparse.kernel_name == "triton" and sparse.plan is not None
        assert sparse._weights is None, "compiled code runs the kernel too and needs no copies"
        neurons = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        kept = torch.zeros(batch, 40, device=DEVICE).scatter(1, choice.indices, 1)[:, None]
        theirs = mlp.down_proj(neurons * kept) + (mean[:, None] @ mlp.down_proj.weight.t())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    sparse.remove()
    assert torch.equal(mlp.down_proj.weight, dense)
