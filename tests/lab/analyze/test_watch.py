"""Watching the layers of a tiny model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from corematching import CoreMatching
from corematching.errors import AlreadyInstalledError, ConfigError, InputError
from corematching.lab.analyze import default_rules, watch_layers
from corematching.lab.analyze.layer import examine_layer
from tests.models import FAMILIES, VISION_FAMILIES, build, image_mask, make_inputs

VISION = [(name, way) for name in VISION_FAMILIES for way in FAMILIES[name].attention]


@pytest.fixture
def inputs(subject):
    return subject.encode(["How many?"], [Image.new("RGB", (64, 64), "red")])


def gather(subject, inputs, read, layers=None):
    found = []
    watch_layers(subject.model, inputs, lambda view: found.append(read(view)), layers)
    return found


def test_every_layer_is_shown_whole(subject, inputs):
    length = inputs["input_ids"].shape[1]
    depth = subject.model.config.text_config.num_hidden_layers

    def read(view):
        assert view.activations.shape[:2] == view.hidden.shape[:2] == (1, length)
        assert view.embeddings.shape == view.hidden.shape
        assert view.num_layers == depth
        return view.layer, int(view.image.sum())

    assert gather(subject, inputs, read) == [(layer, 16) for layer in range(depth)]
    assert gather(subject, inputs, read, layers=[depth - 1, 0]) == [(0, 16), (depth - 1, 16)]


def test_attention_and_contributions_are_the_layers_own(subject, inputs):
    """Rows sum to 1, and the contributions add up to what the attention module gives."""
    seen = {}
    attention = subject.model.get_decoder().layers[1].self_attn
    handle = attention.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))

    def read(view):
        rows = view.attention(view.last[:, None])
        return rows.sum(-1), view.contributions().sum(1)

    ((sums, total),) = gather(subject, inputs, read, layers=[1])
    handle.remove()
    torch.testing.assert_close(sums, torch.ones_like(sums))
    torch.testing.assert_close(total, seen["out"][:, -1], rtol=1e-4, atol=1e-4)


def test_nothing_stays_on_the_model(subject, inputs):
    def count():
        modules = subject.model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = count()
    implementation = subject.model.config.text_config._attn_implementation
    with torch.inference_mode():
        plain = subject.model(**inputs).logits
        watch_layers(subject.model, inputs, lambda view: None)
        again = subject.model(**inputs).logits
    assert count() == before and torch.equal(plain, again)

    def fail(view):
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        watch_layers(subject.model, inputs, fail)
    assert count() == before
    assert subject.model.config.text_config._attn_implementation == implementation


@pytest.mark.parametrize("layers", [[-1], [99], []])
def test_layers_that_do_not_exist(subject, inputs, layers):
    with pytest.raises(ConfigError, match="the model has the layers 0 to"):
        watch_layers(subject.model, inputs, lambda view: None, layers)


def test_a_prompt_without_a_picture(subject):
    inputs = subject.tokenizer("How many?", return_tensors="pt")
    with pytest.raises(InputError, match="no image token"):
        watch_layers(subject.model, inputs, lambda view: None)


def test_a_model_with_a_method_on_it(subject, inputs):
    with (
        CoreMatching(layer=0)(subject.model),
        pytest.raises(AlreadyInstalledError, match="remove it before"),
    ):
        watch_layers(subject.model, inputs, lambda view: None)


@pytest.mark.parametrize(("name", "attention"), VISION)
def test_every_family_can_be_watched(name, attention):
    model = build(name, attention)
    inputs = make_inputs(name, model)
    found = []

    def look(view):
        rows = view.attention(view.last[:, None])
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        found.append(examine_layer(view, default_rules()))

    watch_layers(model, inputs, look)
    tokens = int(image_mask(name, inputs).sum())
    assert [len(layer.rules["paper"].scores) for layer in found] == [tokens] * 4
