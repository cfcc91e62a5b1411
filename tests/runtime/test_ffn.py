"""A sparse FFN computes what the dense one does with its dropped neurons overwritten."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from corematching.backends.sparse_ffn import SparseFFN
from corematching.protocol import NeuronChoice
from tests.runtime.ffns import FORMS, HIDDEN, KEPT, WIDTH, GatedFFN, choose, make


def masked(sparse: SparseFFN, x, choice: NeuronChoice):
    """The dense FFN with its dropped neurons overwritten."""
    keep = torch.zeros(x.shape[0], WIDTH, dtype=torch.bool).scatter(1, choice.indices, True)
    filler = torch.zeros(x.shape[0], WIDTH) if choice.mean is None else choice.mean

    def overwrite(module, args):
        return (torch.where(keep[:, None], args[0], filler[:, None]),)

    handle = sparse.parts.down.register_forward_pre_hook(overwrite)
    out = type(sparse.mlp).forward(sparse.mlp, x)
    handle.remove()
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_compact_neurons_equal_masked_neurons(form, bias, mean, batch):
    sparse, choice = make(form, bias), choose(batch, mean=mean)
    x = torch.randn(batch, 1, HIDDEN)
    sparse.take(choice)
    sparse.gather()
    torch.testing.assert_close(sparse.mlp(x), masked(sparse, x, choice), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_cleared_ffns_stay_dense(form):
    sparse = make(form)
    prompt, token = torch.randn(2, 5, HIDDEN), torch.randn(2, 1, HIDDEN)
    dense = form.forward(sparse.mlp, token)
    assert torch.equal(sparse.mlp(token), dense)
    sparse.take(choose(2))
    sparse.gather()
    assert torch.equal(sparse.mlp(prompt), form.forward(sparse.mlp, prompt))
    assert not torch.allclose(sparse.mlp(token), dense)
    sparse.clear()
    assert torch.equal(sparse.mlp(token), dense)


def test_every_neuron_is_exactly_dense():
    sparse = make(count=WIDTH)
    sparse.take(NeuronChoice(torch.arange(WIDTH)[None]))
    sparse.gather()
    x = torch.randn(1, 1, HIDDEN)
    assert torch.equal(sparse.mlp(x), GatedFFN.forward(sparse.mlp, x))


def test_buffers_are_reused_in_place():
    sparse = make(bias=True)
    sparse.take(choose(2, seed=1, mean=True))
    sparse.gather()
    before = [(t.data_ptr(), t.clone()) for t in sparse._weights.tensors]
    bias = sparse._bias.data_ptr()
    sparse.take(choose(2, seed=2, mean=True))
    sparse.gather()
    for (address, old), new in zip(before, sparse._weights.tensors, strict=True):
        assert new.data_ptr() == address
        assert not torch.equal(new, old)
    assert sparse._bias.data_ptr() == bias
    sparse.take(choose(3, seed=2))
    sparse.gather()
    assert sparse._weights.up.shape == (3, KEPT, HIDDEN)


def test_a_choice_made_in_inference_mode_can_be_replaced_outside():
    sparse, x = make(), torch.randn(1, 1, HIDDEN)
    with torch.inference_mode():
        sparse.take(choose(1, seed=1))
        sparse.gather()
        sparse.mlp(x.clone())
    sparse.take(choose(1, seed=2))
    sparse.gather()
    torch.testing.assert_close(sparse.mlp(x), masked(sparse, x, choose(1, seed=2)))


@pytest.mark.parametrize("mean", [False, True])
def test_equal_neighbours_share_one_set(mean):
    """Beams of one sample choose the same neurons."""
    two = choose(2, mean=mean)
    beams = NeuronChoice(
        two.indices.repeat_interleave(3, 0),
        None if two.mean is None else two.mean.repeat_interleave(3, 0),
    )
    sparse, x = make(), torch.randn(6, 1, HIDDEN)
    sparse.take(beams)
    sparse.gather()
    assert sparse._weights.up.shape[0] == 2
    torch.testing.assert_close(sparse.mlp(x), masked(sparse, x, beams), rtol=1e-5, atol=1e-6)
    sparse.take(NeuronChoice(two.indices[:1].expand(6, -1)))
    sparse.gather()
    assert sparse._weights.up.shape[0] == 1


def test_equal_sets_that_are_no_neighbours_stay_apart():
    choice = choose(4)
    choice.indices[3] = choice.indices[0]
    sparse, x = make(), torch.randn(4, 1, HIDDEN)
    sparse.take(choice)
    sparse.gather()
    assert sparse._weights.up.shape[0] == 4
    torch.testing.assert_close(sparse.mlp(x), masked(sparse, x, choice), rtol=1e-5, atol=1e-6)


def test_an_expanded_batch_shares_its_samples_choices():
    sparse, choice, x = make(), choose(2, mean=True), torch.randn(6, 1, HIDDEN)
    sparse.take(choice)
    sparse.gather()
    expanded = NeuronChoice(
        choice.indices.repeat_interleave(3, 0), choice.mean.repeat_interleave(3, 0)
    )
    torch.testing.assert_close(sparse.mlp(x), masked(sparse, x, expanded), rtol=1e-5, atol=1e-6)


def test_bytes_read_count_every_set_once():
    sparse = make()
    dense = 3 * WIDTH * HIDDEN * 4
    assert sparse.bytes_read(1) == dense
    sparse.take(choose(1))
    sparse.gather()
    assert sparse.bytes_read(1) == sparse.bytes_read(4) == 3 * KEPT * HIDDEN * 4
    sparse.take(choose(2, mean=True))
    sparse.gather()
    assert sparse.bytes_read(2) == 2 * (3 * KEPT * HIDDEN * 4 + HIDDEN * 4)
    sparse.clear()
    assert sparse.bytes_read(2) == dense


def test_remove_leaves_nothing_behind():
    torch.manual_seed(0)
    mlp = GatedFFN().eval()
    before = dict(vars(mlp))
    sparse = SparseFFN(mlp, KEPT)
    assert vars(mlp) == before
    sparse.install()
    sparse.install()
    sparse.take(choose(1))
    sparse.gather()
    sparse.remove()
    sparse.remove()
    assert vars(mlp) == before
    token = torch.randn(1, 1, HIDDEN)
    assert torch.equal(mlp(token), GatedFFN.forward(mlp, token))
    alive = weakref.ref(sparse)
    del sparse
    gc.collect()
    assert alive() is None


def test_remove_puts_an_earlier_patch_back():
    torch.manual_seed(0)
    mlp = GatedFFN().eval()
    own = mlp.forward
    calls = []

    def patched(x):
        calls.append(x.shape)
        return own(x)

    mlp.forward = patched
    sparse = SparseFFN(mlp, KEPT)
    sparse.install()
    calls.clear()
    mlp(torch.randn(1, 4, HIDDEN))
    assert len(calls) == 1
    sparse.remove()
    assert vars(mlp)["forward"] is patched


def test_compiles_without_a_break_and_without_a_second_compilation():
    sparse = make(bias=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(sparse.mlp, fullgraph=True, backend=backend)
    x = torch.randn(2, 1, HIDDEN)
    for seed in (1, 2, 3):
        choice = choose(2, seed=seed, mean=True)
        sparse.take(choice)
        sparse.gather()
        with torch.no_grad():
            torch.testing.assert_close(step(x), masked(sparse, x, choice), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    sparse = SparseFFN(GatedFFN(bias=True).to(dtype).eval(), KEPT)
    sparse.install()
    sparse.take(choose(2, mean=True))
    sparse.gather()
    assert sparse.mlp(torch.randn(2, 1, HIDDEN, dtype=dtype)).dtype == dtype
