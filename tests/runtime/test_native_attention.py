"""Prompts that attend in the kernels give what the model's own attention gives, everywhere."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from corematching import CoreMatching, Sparsifier
from corematching.backends.cpu.native import PrefillAttention, PrefillLayer
from corematching.backends.cpu.tower import TowerLayer
from corematching.model.hooks import HookMonitor, ShapeReader, reads_shapes, show_result

pytestmark = pytest.mark.usefixtures("native_prompts")

WIDTH = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
VISION = {**WIDTH, "num_hidden_layers": 3, "image_size": 32, "patch_size": 4}
TEXT = {**WIDTH, "vocab_size": 97, "num_hidden_layers": 4, "num_key_value_heads": 1}
IMAGE = 96


@pytest.fixture
def calls(monkeypatch):
    """The (queries, keys, mask or not, causal) of what attends in the kernels."""
    seen, own, whole = [], PrefillAttention.attend, PrefillLayer.run

    def attend(self, query, key, value, mask, scaling, causal):
        seen.append((query.shape[2], key.shape[2], mask is not None, causal))
        return own(self, query, key, value, mask, scaling, causal)

    def run(self, x, cos_sin, mask, causal, *args):
        seen.append((x.shape[1], x.shape[1], mask is not None, causal))
        return whole(self, x, cos_sin, mask, causal, *args)

    monkeypatch.setattr(PrefillAttention, "attend", attend)
    monkeypatch.setattr(PrefillLayer, "run", run)
    return seen


@pytest.fixture
def layers(monkeypatch):
    """What the layers of towers give that run in one piece; None where one did not."""
    given, own = [], TowerLayer._run

    def run(self, x, mask):
        given.append(own(self, x, mask))
        return given[-1]

    monkeypatch.setattr(TowerLayer, "_run", run)
    return given


@pytest.fixture
def llava():
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def ask(model, batch=2):
    """A picture of 64 patches and six words; the second sample is shorter."""
    ids = torch.tensor([[1, 2, *[IMAGE] * 64, 3, 4, 5, 6]] * batch)
    mask = torch.ones_like(ids)
    ids[1:, 0], mask[1:, 0] = 0, 0
    pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(torch.bfloat16)}


@torch.no_grad()
def last_logits(model, inputs):
    return model(**inputs).logits[:, -1].float()


def is_close(ours, theirs):
    return bool((ours - theirs).norm() < 3e-2 * theirs.norm())


def test_same_logits_in_padded_batches(llava, calls):
    inputs = ask(llava)
    dense = last_logits(llava, inputs)
    with Sparsifier()(llava):
        calls.clear()
        ours = last_logits(llava, inputs)
    assert calls.count((65, 65, False, False)) == 3 and calls.count((70, 70, True, False)) == 4
    assert is_close(ours, dense)


def test_a_prompt_that_gets_shorter_attends_as_elsewhere(llava, calls):
    inputs = ask(llava)
    method = CoreMatching(keep=16, layer=1, cover=0.99, neuron_score=None)
    with method(llava, engine="torch"):
        theirs = last_logits(llava, inputs)
    assert not calls
    with method(llava):
        calls.clear()
        ours = last_logits(llava, inputs)
    assert calls.count((22, 22, True, False)) == 2
    assert is_close(ours, theirs)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "tanh"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers(kind, act, llava, calls, layers):
    size = VISION | {"hidden_act": act}
    build = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**size)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**size, vision_use_head=False)),
    }[kind]
    torch.manual_seed(2)
    llava.model.vision_tower = build().to(torch.bfloat16).eval()
    pixels = ask(llava)["pixel_values"]

    @torch.no_grad()
    def see():
        return llava.model.vision_tower(pixels).last_hidden_state.float()

    dense = see()
    with Sparsifier()(llava):
        calls.clear()
        layers.clear()
        ours = see()
        assert len(calls) == 3 and len(layers) == (0 if act == "tanh" else 3)
    assert is_close(ours, dense)
    calls.clear()
    assert torch.equal(see(), dense) and not calls


def test_the_tower_is_counted_as_before(llava):
    counted = []
    for engine in ("torch", "auto"):
        with Sparsifier()(llava, engine=engine) as run:
            last_logits(llava, ask(llava))
            counted.append(run.report.vision_flops)
    assert counted[0] == counted[1] > 0


def test_hooks_in_a_tower_see_what_they_always_see(llava, calls):
    seen = []
    attention = llava.model.vision_tower.encoder.layers[1].self_attn
    with Sparsifier()(llava):
        handle = attention.k_proj.register_forward_hook(lambda *args: seen.append(args[2].shape))
        calls.clear()
        last_logits(llava, ask(llava))
        handle.remove()
    assert seen == [(2, 65, 64)]
    assert len(calls) == 6  # two layers of the tower, four of the decoder


@pytest.mark.parametrize("place", ["mlp", "mlp.activation_fn", "mlp.fc2", "self_attn.out_proj"])
def test_a_layer_of_a_tower_with_a_hook_inside_runs_as_it_is(place, llava, layers):
    seen, inputs = [], ask(llava)
    layer = llava.model.vision_tower.encoder.layers[1]
    dense = last_logits(llava, inputs)
    with Sparsifier()(llava):
        hook = layer.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[2]))
        layers.clear()
        ours = last_logits(llava, inputs)
        hook.remove()
    assert len(seen) == 1 and len(layers) == 2
    assert is_close(ours, dense)


class DoublingLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", ["mlp.fc1", "self_attn.out_proj", "self_attn.q_proj"])
def test_a_part_of_a_tower_that_becomes_another_is_run_as_it_is(place, llava):
    inputs = ask(llava)
    with Sparsifier()(llava):
        last_logits(llava, inputs)
        for layer in llava.model.vision_tower.encoder.layers:
            old = layer.get_submodule(place)
            new = DoublingLinear(old.in_features, old.out_features).to(old.weight.dtype)
            new.weight, new.bias = old.weight, old.bias
            layer.set_submodule(place, new)
        ours = last_logits(llava, inputs)
    assert is_close(ours, last_logits(llava, inputs))


def test_eager_towers_stay_eager(llava, calls):
    llava.model.vision_tower.config._attn_implementation = "eager"
    with Sparsifier()(llava):
        calls.clear()
        last_logits(llava, ask(llava))
    assert len(calls) == 4


def test_results_are_shown_to_hooks_that_only_count():
    module, shapes = torch.nn.Linear(3, 5), []

    def count(module, args, out):
        shapes.append((args[0].shape, out.shape))

    watch = HookMonitor([module], ignored=[reads_shapes])
    module.register_forward_hook(ShapeReader(count))
    assert not watch.sees_any()
    show_result(module, torch.zeros(2, 3), torch.zeros(2, 5))
    module.register_forward_hook(
        lambda module, args, kwargs, out: shapes.append(kwargs), with_kwargs=True
    )
    assert watch.sees_any()
    show_result(module, torch.zeros(2, 3), torch.zeros(2, 5))
    assert shapes == [((2, 3), (2, 5)), ((2, 3), (2, 5)), {}]
