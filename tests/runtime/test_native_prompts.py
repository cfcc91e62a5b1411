"""Prompts in the kernels give what the model's own forward gives, and leave nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from corematching import CoreMatching, Sparsifier
from corematching.backends.cpu.native import Gemm, PrefillLayer, prefers_native
from corematching.backends.cpu.prefill import NativePrompts
from corematching.model.ffn import FFNParts
from corematching.model.spec import ModelSpec
from tests import models
from tests.chosen import neurons_of

by_default = pytest.mark.skipif(
    not prefers_native(torch.bfloat16), reason="prompts stay PyTorch's here"
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Heads of 12 numbers: layers run in parts."""
NEURONS = {"token_score": None, "dense_first": 0, "dense_last": 0}


def build(kind="llama", dtype=torch.bfloat16):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "granite": (GraniteConfig, GraniteForCausalLM),
    }[kind]
    extra = {"residual_multiplier": 0.2} if kind == "granite" else {}
    return model(config(**SIZES, **extra)).to(dtype).eval()


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that run in the kernels, and whole layers."""
    counted = []
    for kind, name in ((Gemm, "linear"), (Gemm, "gated"), (Gemm, "joint"), (PrefillLayer, "run")):
        own = getattr(kind, name)

        def count(self, *args, own=own, name=name, **kwargs):
            counted.append(name)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, count)
    return counted


def prompt(batch=1, length=11):
    return torch.arange(batch * length).view(batch, length) * 7 % 97


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits.float()


@pytest.mark.usefixtures("native_prompts")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [2, 11])
def test_same_logits(kind, length, calls):
    model, ids = build(kind), prompt(2, length)
    dense = logits(model, input_ids=ids)
    prompts = NativePrompts(find_parts(model))
    prompts.install([FFNParts(layer.mlp) for layer in model.model.layers])
    calls.clear()
    ours = logits(model, input_ids=ids)
    prompts.remove()
    assert calls.count("gated") == calls.count("joint") == 4
    assert calls.count("linear") == 8
    assert (ours - dense).norm() < 2e-2 * dense.norm()


@pytest.mark.usefixtures("native_prompts")
def test_float32_has_the_same_logits(calls):
    model, ids = build(dtype=torch.float32), prompt(2, 40)
    dense = logits(model, input_ids=ids)
    with Sparsifier()(model):
        calls.clear()
        ours = logits(model, input_ids=ids)
        assert calls.count("joint") == calls.count("gated") == 4
        calls.clear()
        logits(model, input_ids=prompt())
        assert not calls  # too few rows
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native_prompts")
def test_towers_and_projectors_too(calls):
    model = models.build("llava").to(torch.bfloat16)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels = models.make_inputs("llava", model)["pixel_values"].to(torch.bfloat16)

    @torch.no_grad()
    def see():
        return model.get_image_features(pixel_values=pixels).pooler_output[0]

    dense = see()
    with Sparsifier()(model):
        calls.clear()
        ours = see()
    projections = sum(type(m) is torch.nn.Linear for m in projector.modules())
    assert calls.count("run") == len(tower.encoder.layers)
    assert calls.count("linear") == projections and len(calls) == calls.count("run") + projections
    assert (ours - dense).float().norm() < 2e-2 * dense.float().norm()


@by_default
def test_threads_see_their_own_pictures():
    """The tower runs outside the model's forward, so no lock keeps threads apart there."""
    model = models.build("llava").to(torch.bfloat16)
    pixels = models.make_inputs("llava", model)["pixel_values"].to(torch.bfloat16)
    batches = [(factor * pixels).repeat(count, 1, 1, 1) for factor, count in ((1, 16), (-0.5, 24))]

    @torch.no_grad()
    def see(batch):
        return torch.cat(list(model.get_image_features(pixel_values=batch).pooler_output))

    def repeat(batch):
        return sum(not torch.equal(see(batch), alone[len(batch)]) for _ in range(40))

    with Sparsifier()(model):
        alone = {len(batch): see(batch) for batch in batches}
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(repeat, batches)) == [0, 0]


@by_default
def test_layers_that_look_like_llamas_are_tried_first():
    model, ids = build("granite"), prompt(2)
    dense = logits(model, input_ids=ids)
    with Sparsifier()(model):
        ours = logits(model, input_ids=ids)
    assert (ours - dense).norm() < 2e-2 * dense.norm()


@pytest.mark.usefixtures("native_prompts")
def test_unknown_ffns_keep_their_forward(calls):
    model, ids = build(), prompt()
    dense = logits(model, input_ids=ids)
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)
    prompts = NativePrompts(find_parts(model))
    prompts.install([])
    calls.clear()
    ours = logits(model, input_ids=ids)
    prompts.remove()
    assert "joint" in calls
    assert "gated" not in calls
    assert (ours - dense).norm() < 2e-2 * dense.norm()


def find_parts(model):
    layers = list(model.model.layers)
    attentions, ffns = [x.self_attn for x in layers], [x.mlp for x in layers]
    return ModelSpec(model.model, layers, attentions, ffns, [], model.config, (), None)


class DoublingMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


@by_default
def test_ffns_that_compute_more_keep_their_forward(calls):
    model, ids = build(), prompt()
    for layer in model.model.layers:
        layer.mlp.__class__ = DoublingMLP
    dense = logits(model, input_ids=ids)
    with Sparsifier()(model):
        calls.clear()
        ours = logits(model, input_ids=ids)
    assert "joint" in calls
    assert "gated" not in calls
    assert (ours - dense).norm() < 2e-2 * dense.norm()


class DoublingLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@by_default
@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_a_projection_that_becomes_another_is_run_as_it_is(name):
    model, ids = build(), prompt()
    with Sparsifier()(model):
        logits(model, input_ids=ids)
        for layer in model.model.layers:
            old = getattr(layer.self_attn, name)
            new = DoublingLinear(old.in_features, old.out_features, bias=False).to(old.weight.dtype)
            new.weight = old.weight
            setattr(layer.self_attn, name, new)
        ours = logits(model, input_ids=ids)
    dense = logits(model, input_ids=ids)
    assert (ours - dense).norm() < 2e-2 * dense.norm()


@by_default
def test_hooks_on_all_modules_see_every_module():
    model, ids, seen = build(), prompt(), []
    with Sparsifier()(model):
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(module)
        )
        try:
            logits(model, input_ids=ids)
        finally:
            handle.remove()
    for layer in model.model.layers:
        assert {layer.mlp.gate_proj, layer.mlp.act_fn, layer.self_attn.q_proj} <= set(seen)


@by_default
def test_padded_batches_are_as_singles():
    model, ids = build(), prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with Sparsifier()(model):
        both = logits(model, input_ids=ids, attention_mask=mask)
        alone = logits(model, input_ids=ids[:1, 4:])
    assert (both[:1, 4:] - alone).norm() < 2e-2 * alone.norm()


@by_default
def test_hooks_see_what_they_always_see(calls):
    model, ids, seen = build(), prompt(), []
    layer = model.model.layers[1]
    modules = [layer.mlp.gate_proj, layer.mlp.down_proj, layer.self_attn.k_proj, layer.mlp]
    with Sparsifier()(model):
        for module in modules:
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
        logits(model, input_ids=ids)
    assert [m for m, *_ in seen] == [modules[2], modules[0], modules[1], modules[3]]
    for module, x, out in seen[:3]:
        expected = torch.nn.functional.linear(x, module.weight)
        assert (out - expected).float().norm() < 1e-2 * expected.float().norm()


@by_default
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hooks_in_front_of_an_ffn_change_what_it_gets(calls, with_kwargs):
    model, ids = build(), prompt()
    layer, last = model.model.layers[1], model.model.layers[2]

    def halve(module, args, *kwargs):
        return ((args[0] / 2,), *kwargs) if with_kwargs else args[0] / 2

    layer.mlp.register_forward_pre_hook(halve, with_kwargs=with_kwargs)
    last.mlp.down_proj.register_forward_pre_hook(halve, with_kwargs=with_kwargs)
    expected = logits(model, input_ids=ids)
    with Sparsifier()(model):
        calls.clear()
        got = logits(model, input_ids=ids)
    assert calls.count("gated") == len(model.model.layers)
    assert (got - expected).norm() < 2e-2 * expected.norm()


@by_default
def test_a_gate_is_seen_without_another_forward(calls):
    model, ids = build(), prompt()
    method = CoreMatching(beta=0.5, firing=0.5, **NEURONS)
    found = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine) as run:
            calls.clear()
            logits(model, input_ids=ids)
            found.append(neurons_of(run))
    assert calls.count("gated") == len(model.model.layers)
    for index, choice in found[0].items():
        close = choice.gate_threshold / found[1][index].gate_threshold
        assert close.sub(1).abs().max() < 0.05


@by_default
def test_neurons_are_chosen_from_the_kernels_activations(calls):
    model, ids = build(), prompt()
    method = CoreMatching(beta=0.5, **NEURONS)
    chosen = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine) as run:
            model.generate(ids, max_new_tokens=3, do_sample=False)
            chosen.append(neurons_of(run))
    assert "gated" in calls
    for index, choice in chosen[0].items():
        assert torch.equal(choice.indices, chosen[1][index].indices)


@by_default
def test_batches_of_single_tokens_run_on_chosen_neurons(calls):
    model, ids = build(), prompt(2)
    method = CoreMatching(beta=0.5, **NEURONS)
    answers = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine), torch.no_grad():
            cache = StaticCache(model.config, max_cache_len=16)
            model(input_ids=ids, past_key_values=cache)
            calls.clear()
            answers.append(model(input_ids=ids[:, :1], past_key_values=cache).logits.float())
    assert "gated" not in calls
    assert (answers[1] - answers[0]).norm() < 2e-2 * answers[0].norm()


@by_default
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_gradients_and_other_types_take_the_own_forward(engine, calls):
    model, ids = build(), prompt()
    with Sparsifier()(model, engine=engine):
        calls.clear()
        model(input_ids=ids).logits.sum().backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad is not None
        assert not calls
    model = build(dtype=torch.float64)
    with Sparsifier()(model, engine=engine):
        logits(model, input_ids=ids)
    assert not calls


@by_default
def test_eager_attention_stays_eager(calls):
    model, ids = build(), prompt()
    model.set_attn_implementation("eager")
    with Sparsifier()(model), torch.no_grad():
        calls.clear()
        maps = model(input_ids=ids, output_attentions=True).attentions
    assert maps[0].shape == (1, 4, 11, 11)
    assert "joint" not in calls


@by_default
def test_nothing_stays_on_the_model():
    model = build()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with CoreMatching(beta=0.5, **NEURONS)(model):
        assert "forward" in vars(model.model.layers[0].mlp)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
