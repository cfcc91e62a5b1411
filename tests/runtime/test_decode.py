"""Native decode steps give what PyTorch's give, whatever generate() does with them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from corematching.backends.cpu.native import find_kernels
from corematching.protocol import NeuronChoice
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.engines import FFNS, STEP, follow, generate_dict, make_method, on_both
from tests.runtime.families import STEPS, RandomNeurons, TestMethod, assert_same, generate

WHOLE = ["llama", "qwen2", "qwen3", "mistral", "llava", "llava_onevision", "qwen2_vl", "qwen3_vl"]
OTHER = ["gemma2", "gemma3", "paligemma", "mistral_window", "llava_mistral_window"]
pytestmark = pytest.mark.skipif(find_kernels() is None, reason="no compiled kernels")


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_steps_equal_pytorch(name, batch, neurons):
    model = build(name)
    inputs = make_inputs(name, model, batch=batch)
    method = make_method(batch, neurons=neurons)
    theirs, ours, report = on_both(model, method, lambda m: generate(m, inputs))
    assert_same(ours, theirs)
    assert report.kernel.startswith(STEP)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_steps_of_several_threads_equal_pytorch(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        theirs, ours, report = on_both(model, make_method(3), lambda m: generate(m, inputs))
    finally:
        torch.set_num_threads(before)
    assert_same(ours, theirs)
    assert report.kernel.startswith(STEP)


@pytest.mark.parametrize("name", OTHER)
def test_other_decoders_get_native_ffns(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    theirs, ours, report = on_both(model, make_method(2), lambda m: generate(m, inputs))
    assert_same(ours, theirs)
    assert report.kernel.startswith(FFNS)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_kept_counts_that_differ_between_padded_samples(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=3)
    method = make_method(3, tokens=True)
    theirs, ours, report = on_both(model, method, lambda m: generate(m, inputs, steps=8))
    assert_same(ours, theirs)
    assert len({s.kept_tokens for s in report.samples}) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 24, "hidden_act": "gelu"},
        {"hidden_act": "relu", "intermediate_size": 33},
        {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_shapes(changes, dtype):
    model = build("llama", **changes).to(dtype)
    inputs = make_inputs("llama", model, batch=2)
    given = torch.randint(3, 90, (2, 5))
    theirs, ours, report = on_both(model, make_method(2), lambda m: follow(m, inputs, given))
    error = (ours - theirs).norm() / theirs.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)
    assert report.kernel.startswith(STEP)


def test_the_cache_is_an_ordinary_one():
    model = build("llama")
    inputs = make_inputs("llama", model, batch=2)

    def run(m):
        out = generate_dict(m, inputs)
        return out.past_key_values

    theirs, ours, _ = on_both(model, make_method(2), run)
    assert isinstance(ours, DynamicCache) and ours.get_seq_length() == theirs.get_seq_length()
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(layer)
        torch.testing.assert_close(mine.keys, layer.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.values, layer.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, tokens", [("llama", False), ("llava", True)])
def test_a_second_turn_and_a_crop(name, tokens):
    model = build(name)
    inputs = make_inputs(name, model, batch=1)

    def run(m):
        first = generate_dict(m, inputs)
        turn = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        cache = first.past_key_values
        kept = copy.deepcopy(cache)
        second = generate_dict(m, {"input_ids": turn}, past_key_values=cache)
        if not tokens:
            cache.crop(-3)
            assert cache.get_seq_length() == turn.shape[1] + STEPS - 4
        third = generate_dict(m, {"input_ids": turn}, past_key_values=kept)
        return second.sequences, third.sequences

    theirs, ours, _ = on_both(model, make_method(1, tokens=tokens), run)
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_a_crop_leaves_earlier_slices_alone():
    model = build("llama")
    inputs = make_inputs("llama", model)
    run = attach(model, make_method())
    try:
        cache = generate_dict(model, inputs).past_key_values
        held, before = cache.layers[0].keys, cache.layers[0].keys.clone()
        cache.crop(-2)
        with torch.no_grad():
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        assert torch.equal(held, before)
        assert run.report.kernel.startswith(STEP)
    finally:
        detach(model)


def test_beams_and_several_sequences():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    method = make_method(6)
    method.neurons.seeds = (1, 1, 1, 2, 2, 2)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    theirs, ours, report = on_both(model, method, lambda m: m.generate(**inputs, **options))
    assert torch.equal(ours, theirs) and report.kernel.startswith(STEP)


def test_sampling_draws_the_same():
    model = build("llama")
    inputs = make_inputs("llama", model, batch=2)

    def run(m):
        torch.manual_seed(3)
        return m.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=20)

    theirs, ours, _ = on_both(model, make_method(2), run)
    assert torch.equal(ours, theirs)


def test_long_answers_outgrow_the_first_buffer():
    model = build("llama")
    inputs = make_inputs("llama", model)
    theirs, ours, _ = on_both(model, make_method(), lambda m: generate(m, inputs, steps=150))
    assert_same(ours, theirs, 1e-3)


@pytest.mark.parametrize("rule", ["input_threshold", "gate_threshold", "output_threshold"])
def test_thresholds(rule):
    class Limited(RandomNeurons):
        per_token = True

        def counts(self, num_layers, width):
            return (width,) * num_layers

        def choose(self, view, count):
            rows = torch.arange(count).expand(len(self.seeds), -1)
            limits = torch.linspace(0.1, 0.3, len(self.seeds))
            return NeuronChoice(rows, **{rule: limits})

    model = build("llama")
    inputs = make_inputs("llama", model, batch=2)
    method = TestMethod(None, Limited((1, 2)))
    theirs, ours, report = on_both(model, method, lambda m: generate(m, inputs))
    assert_same(ours, theirs)
    dense = generate(model, inputs)
    assert not torch.allclose(ours.logits, dense.logits, atol=1e-3)
    assert (report.decode_bytes < report.dense_decode_bytes) == (rule != "input_threshold")


def test_bytes_are_those_of_the_rows_read():
    model = build("llama")
    inputs = make_inputs("llama", model)
    _, _, report = on_both(model, make_method(), lambda m: generate(m, inputs))
    layer = model.model.layers[0]
    row = 4 * layer.mlp.up_proj.in_features
    dropped = sum(w - k for w, k in zip(report.widths, report.neurons, strict=True))
    assert report.dense_decode_bytes - report.decode_bytes == 3 * row * dropped
    assert report.to_dict()["decode_bytes_ratio"] == report.decode_bytes / report.dense_decode_bytes


@pytest.mark.parametrize("hidden, width, heads", [(100, 1000, 5), (100, 1000, 2), (128, 1024, 4)])
def test_bf16_steps_are_as_near_to_float64_as_pytorchs(hidden, width, heads):
    """Odd sizes: with the same neurons, both engines differ from float64 by roundings alone."""
    size = hidden // heads
    shape = {"hidden_size": hidden, "intermediate_size": width, "head_dim": size}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    model = build("llama", **shape).to(torch.bfloat16)
    inputs = make_inputs("llama", model, batch=2)
    given = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs, ours, report = on_both(model, make_method(2), lambda m: follow(m, inputs, given))
    assert report.kernel.startswith(STEP)
    exact = copy.deepcopy(model).double()
    attach(exact, make_method(2), "torch")
    truth = follow(exact, inputs, given)[:, 1:]
    own, pytorchs = ((x[:, 1:].double() - truth).norm() for x in (ours, theirs))
    assert own < 1.1 * pytorchs < 0.1 * truth.norm()
