"""VisionZip and PruMerge on tiny models: what the tower computed is what they choose by."""

import json

import pytest
import torch

from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.methods import BaseMethod, method_from_dict, method_from_text
from corematching.policy.vision_merging import prune_and_merge, zip_tokens
from corematching.protocol import VisionView
from tests.methods.field.test_field import run
from tests.models import build, image_mask, make_inputs
from tests.policy.views import make_view

NAMES = ("visionzip", "prumerge")


@pytest.fixture(scope="module")
def model():
    return build("llava")


def single(inputs, row):
    """One row of a batch without its padding."""
    start = int((inputs["attention_mask"][row] == 0).sum())
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
    for key in ("input_ids", "attention_mask"):
        alone[key] = alone[key][:, start:]
    return alone


def tower_of(model, pixels, layer):
    """Maps, keys and features by the eager tower of the same weights."""
    tower = model.model.vision_tower
    attentions = [module for name, module in tower.named_modules() if name.endswith("self_attn")]
    seen = {}
    handle = attentions[layer].k_proj.register_forward_hook(lambda m, a, o: seen.update(keys=o))
    other = attentions[layer].q_proj.register_forward_hook(lambda m, a, o: seen.update(queries=o))
    with torch.no_grad():
        output = tower(pixels, output_attentions=True, output_hidden_states=True)
    handle.remove()
    other.remove()
    layers = model.config.vision_feature_layer
    return output.attentions[layer], seen, output.hidden_states[layers][:, 1:]


def test_visionzip_chooses_and_merges_by_the_eager_tower(model):
    eager = build("llava", "eager")
    inputs = make_inputs("llava", model)
    image = image_mask("llava", inputs)
    maps, seen, features = tower_of(eager, inputs["pixel_values"], -2)
    keys = seen["keys"].unflatten(2, (2, -1)).transpose(1, 2)[:, :, 1:]
    keep, merged = zip_tokens(features, maps[:, :, 0, 1:], keys, dominant=5, contextual=1)
    with torch.no_grad():
        embeddings = model.model.multi_modal_projector(merged)[0]

    entered = []
    layer = model.model.language_model.layers[0]
    with torch.no_grad(), method_from_text("visionzip:keep_tokens=6")(model) as work:
        norm = layer.input_layernorm  # behind the hook that drops tokens
        handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        model(**inputs)
        handle.remove()
    assert work.report.samples[0].keep_mask == keep[0].tolist()
    kept = torch.ones_like(image[0])
    kept[image[0]] = keep[0]
    got = entered[0][0][image[0][kept]]
    torch.testing.assert_close(got, embeddings[keep[0]], atol=1e-4, rtol=1e-4)


def test_prumerge_chooses_by_one_softmax_over_the_width(model):
    inputs = make_inputs("llava", model)
    _, seen, features = tower_of(build("llava", "eager"), inputs["pixel_values"], -1)
    scores = seen["queries"][:, :1] @ seen["keys"].transpose(1, 2) * 32**-0.5
    attention = scores.softmax(-1)[:, 0, 1:]
    keep, _ = prune_and_merge(features, attention, seen["keys"][:, 1:], torch.tensor([4]))
    report = run(method_from_text("prumerge:keep_tokens=4"), model, inputs)[1]
    assert report.samples[0].keep_mask == keep[0].tolist()


@pytest.mark.parametrize("name", ["visionzip:keep_ratio=0.4", "prumerge:keep_tokens=5", "prumerge"])
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_batch_chooses_as_its_singles(name, family):
    model = build(family)
    inputs = make_inputs(family, model, batch=2)
    method = method_from_text(name)
    with torch.no_grad(), method(model) as work:
        logits = model(**inputs).logits[:, -1]
        report = work.report
        for row in range(2):
            alone = model(**single(inputs, row)).logits[:, -1]
            assert work.report.samples[0].keep_mask == report.samples[row].keep_mask
            torch.testing.assert_close(alone, logits[row : row + 1], atol=1e-4, rtol=1e-4)
            assert 0 < work.report.samples[0].kept_tokens < 16


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_keeping_all_is_dense(family):
    model = build(family)
    inputs = make_inputs(family, model, batch=2)
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1]
        with method_from_text("visionzip:keep_ratio=1.0")(model) as work:
            kept = model(**inputs).logits[:, -1]
            assert work.report.samples[0].kept_tokens == 16
    torch.testing.assert_close(kept, dense, atol=1e-5, rtol=1e-5)


def test_several_images_stand_alone(model):
    inputs = make_inputs("llava", model, batch=2, images=2)
    with torch.no_grad(), method_from_text("visionzip:keep_tokens=4")(model) as work:
        model(**inputs)
        for sample in work.report.samples:
            assert sum(sample.keep_mask[:16]) == sum(sample.keep_mask[16:]) == 4


@pytest.mark.parametrize("images", [1, [1, 2]])
def test_beams_see_their_own_images(model, images):
    inputs = make_inputs("llava", model, batch=2, images=images)
    method = method_from_text("visionzip:keep_tokens=4")
    with torch.no_grad(), method(model) as work:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        greedy = [sample.keep_mask for sample in work.report.samples]
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=3)
        assert [sample.keep_mask for sample in work.report.samples] == greedy


def test_a_prompt_without_an_image(model):
    inputs = make_inputs("llava", model, images=0)
    with torch.no_grad():
        dense = model(**inputs).logits
        with method_from_text("visionzip")(model):
            torch.testing.assert_close(model(**inputs).logits, dense)


def test_image_tokens_without_pixels_are_refused(model):
    inputs = make_inputs("llava", model)
    inputs.pop("pixel_values")
    method = method_from_text("visionzip")
    with torch.no_grad(), method(model), pytest.raises(InputError, match="pass pixel_values"):
        model(**inputs)
    with torch.no_grad():
        model(**make_inputs("llava", model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm", "gemma3", "llava_next", "internvl"])
def test_models_without_one_token_per_patch_are_refused_at_once(name, family):
    model = build(family)
    with pytest.raises(UnsupportedModelError, match="each patch of its vision tower"):
        method_from_text(name).install(model)


def test_a_layer_that_the_tower_has_not(model):
    with pytest.raises(ConfigError, match="the vision tower has 2 attention layers"):
        method_from_text("visionzip:vision_layer=-3").install(model)


@pytest.mark.parametrize(
    "text", ["visionzip:keep_tokens=0", "prumerge:keep_ratio=1.5", "visionzip:keep_tokens=-1"]
)
def test_wrong_amounts(text):
    with pytest.raises(ConfigError, match="keep_"):
        method_from_text(text)


@pytest.mark.parametrize("layer", [0, 2, "last"])
def test_wrong_layers(layer):
    with pytest.raises(ConfigError, match="give a negative whole number"):
        method_from_text(f"prumerge:vision_layer={layer}")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    method = method_from_text(name)
    assert isinstance(method, BaseMethod) and method.tokens.drop_after(12) == (-1,)
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_merged_tokens_take_their_places_by_hand():
    """Four patches of width 1 and one head: patch 2 is dominant, 0 the target, 3 like 0."""
    keys = torch.tensor([[[[0.0, 0], [1, 0], [0, 1], [0, 5], [2, 0.1]]]])  # class token first
    queries = torch.tensor([[[[0.0, 1], [9, 9], [9, 9], [9, 9], [9, 9]]]])
    features = torch.tensor([[[1.0], [10.0], [100.0], [1000.0]]])
    vision = VisionView(queries, keys, 1.0, 1, features, project=lambda x: 2 * x)
    view = make_view(["tiiiit"], layer=-1, hidden=torch.zeros(1, 6, 1), vision=vision)
    rule = method_from_text("prumerge:keep_tokens=1").tokens
    choice = rule.choose(view)
    assert choice.keep[0].tolist() == [True, False, False, True, False, True]
    weights = torch.tensor([0.0, 0.0, 1.0, 5.0, 0.1]).div(2**0.5).softmax(0)[1:]
    expected = 100 + float(weights @ features[0, :, 0] - weights[2] * 100)
    assert choice.hidden[0, :, 0].tolist() == pytest.approx([0, 0, 0, 2 * expected, 0, 0])
    assert choice.cut.item() == pytest.approx(float(weights[2]))
    with pytest.raises(ConfigError, match="shows no vision tower"):
        rule.choose(make_view(["tiiiit"], layer=-1))
