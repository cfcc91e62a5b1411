import pytest
import torch
from torch.nn import functional as F

from corematching.backends.kernels import CompactWeights, gather_columns, gather_rows, sparse_ffn

HIDDEN, WIDTH, KEPT = 8, 20, 5


def random_weights(sets: int, gated: bool = True, biased: bool = False) -> CompactWeights:
    torch.manual_seed(sets)
    matrices = {
        "up": torch.randn(sets, KEPT, HIDDEN),
        "down": torch.randn(sets, HIDDEN, KEPT),
    }
    if gated:
        matrices["gate"] = torch.randn(sets, KEPT, HIDDEN)
    if biased:
        matrices["up_bias"] = torch.randn(sets, KEPT)
        if gated:
            matrices["gate_bias"] = torch.randn(sets, KEPT)
    return CompactWeights(**matrices)


def slow_ffn(x, weights, bias, activation):
    """One sample, one neuron at a time."""
    rows = []
    for b, token in enumerate(x):
        s = b * weights.up.shape[0] // len(x)
        out = torch.zeros(HIDDEN)
        if bias is not None:
            out = out + bias[b * bias.shape[0] // len(x)]
        for k in range(KEPT):
            value = weights.up[s, k] @ token
            if weights.up_bias is not None:
                value = value + weights.up_bias[s, k]
            if weights.gate is None:
                value = activation(value)
            else:
                gate = weights.gate[s, k] @ token
                if weights.gate_bias is not None:
                    gate = gate + weights.gate_bias[s, k]
                value = activation(gate) * value
            out = out + value * weights.down[s, :, k]
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("batch", "sets", "biases"), [(1, 1, 0), (3, 1, 3), (3, 3, 1), (6, 2, 6)])
def test_equals_one_neuron_at_a_time(gated, biased, batch, sets, biases):
    weights = random_weights(sets, gated, biased)
    x = torch.randn(batch, HIDDEN)
    bias = torch.randn(biases, HIDDEN) if biases else None
    expected = slow_ffn(x, weights, bias, F.silu)
    torch.testing.assert_close(sparse_ffn(x, weights, bias, F.silu), expected)


def test_gather_takes_the_rows_of_every_set():
    weight = torch.randn(WIDTH, HIDDEN)
    indices = torch.tensor([[0, 3, 19], [3, 4, 5]])
    torch.testing.assert_close(gather_rows(weight, indices), weight[indices], rtol=0, atol=0)


def test_gather_takes_the_columns_of_every_set():
    weight = torch.randn(HIDDEN, WIDTH)
    indices = torch.tensor([[1, 7], [2, 8]])
    expected = weight[:, indices].transpose(0, 1)
    assert torch.equal(gather_columns(weight, indices), expected)


def test_gather_takes_the_entries_of_a_vector():
    vector, indices = torch.randn(WIDTH), torch.tensor([[1, 7], [2, 8]])
    assert torch.equal(gather_rows(vector, indices), vector[indices])


def test_gather_writes_in_place():
    weight, indices = torch.randn(WIDTH, HIDDEN), torch.tensor([[1, 2]])
    out = torch.empty(1, 2, HIDDEN)
    assert gather_rows(weight, indices, out) is out
    assert torch.equal(out, weight[indices])
    columns = torch.empty(1, WIDTH, 2)
    assert gather_columns(weight, indices, columns) is columns
    assert torch.equal(columns[0], weight[:, [1, 2]])


def test_keeps_the_dtype():
    weights = random_weights(1)
    half = CompactWeights(
        up=weights.up.bfloat16(), down=weights.down.bfloat16(), gate=weights.gate.bfloat16()
    )
    out = sparse_ffn(torch.randn(2, HIDDEN).bfloat16(), half, None, F.silu)
    assert out.dtype == torch.bfloat16
