"""Prompts in the kernels give what the model's own forward gives, and leave nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from corematching import CoreMatching, Sparsifier
from corematching.backends.cpu.prefill import NativePrompts
from corematching.model.ffn import FFNParts
from corematching.model.spec import ModelSpec
from tests import models
from tests.runtime.native_prompts import (
    NEURONS,
    build,
    by_default,
    logits,
    prompt,
)


@pytest.mark.usefixtures("native_prompts")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [2, 11])
def test_same_logits(kind, length, native_calls):
    model, ids = build(kind), prompt(2, length)
    dense = logits(model, input_ids=ids)
    prompts = NativePrompts(find_parts(model))
    prompts.install([FFNParts(layer.mlp) for layer in model.model.layers])
    native_calls.clear()
    ours = logits(model, input_ids=ids)
    prompts.remove()
    assert native_calls.count("gated") == native_calls.count("joint") == 4
    assert native_calls.count("linear") == 8
    assert (ours - dense).norm() < 2e-2 * dense.norm()


@pytest.mark.usefixtures("native_prompts")
def test_float32_has_the_same_logits(native_calls):
    model, ids = build(dtype=torch.float32), prompt(2, 40)
    dense = logits(model, input_ids=ids)
    with Sparsifier()(model):
        native_calls.clear()
        ours = logits(model, input_ids=ids)
        assert native_calls.count("joint") == native_calls.count("gated") == 4
        native_calls.clear()
        logits(model, input_ids=prompt())
        assert not native_calls  # too few rows
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native_prompts")
def test_towers_and_projectors_too(native_calls):
    model = models.build("llava").to(torch.bfloat16)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels = models.make_inputs("llava", model)["pixel_values"].to(torch.bfloat16)

    @torch.no_grad()
    def see():
        return model.get_image_features(pixel_values=pixels).pooler_output[0]

    dense = see()
    with Sparsifier()(model):
        native_calls.clear()
        ours = see()
    projections = sum(type(m) is torch.nn.Linear for m in projector.modules())
    assert native_calls.count("run") == len(tower.encoder.layers)
    assert (
        native_calls.count("linear") == projections
        and len(native_calls) == native_calls.count("run") + projections
    )
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
def test_unknown_ffns_keep_their_forward(native_calls):
    model, ids = build(), prompt()
    dense = logits(model, input_ids=ids)
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj)
    prompts = NativePrompts(find_parts(model))
    prompts.install([])
    native_calls.clear()
    ours = logits(model, input_ids=ids)
    prompts.remove()
    assert "joint" in native_calls
    assert "gated" not in native_calls
    assert (ours - dense).norm() < 2e-2 * dense.norm()


def find_parts(model):
    layers = list(model.model.layers)
    attentions, ffns = [x.self_attn for x in layers], [x.mlp for x in layers]
    return ModelSpec(model.model, layers, attentions, ffns, [], model.config, (), None)


class DoublingMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


@by_default
def test_ffns_that_compute_more_keep_their_forward(native_calls):
    model, ids = build(), prompt()
    for layer in model.model.layers:
        layer.mlp.__class__ = DoublingMLP
    dense = logits(model, input_ids=ids)
    with Sparsifier()(model):
        native_calls.clear()
        ours = logits(model, input_ids=ids)
    assert "joint" in native_calls
    assert "gated" not in native_calls
    assert (ours - dense).norm() < 2e-2 * dense.norm()


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
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_gradients_and_other_types_take_the_own_forward(engine, native_calls):
    model, ids = build(), prompt()
    with Sparsifier()(model, engine=engine):
        native_calls.clear()
        model(input_ids=ids).logits.sum().backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad is not None
        assert not native_calls
    model = build(dtype=torch.float64)
    with Sparsifier()(model, engine=engine):
        logits(model, input_ids=ids)
    assert not native_calls


@by_default
def test_eager_attention_stays_eager(native_calls):
    model, ids = build(), prompt()
    model.set_attn_implementation("eager")
    with Sparsifier()(model), torch.no_grad():
        native_calls.clear()
        maps = model(input_ids=ids, output_attentions=True).attentions
    assert maps[0].shape == (1, 4, 11, 11)
    assert "joint" not in native_calls


@by_default
def test_nothing_stays_on_the_model():
    model = build()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with CoreMatching(beta=0.5, **NEURONS)(model):
        assert "forward" in vars(model.model.layers[0].mlp)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
