"""What cannot work is refused by name, before anything runs, with what to do."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from corematching.errors import UnsupportedModelError
from corematching.methods import CATS, TEAL, CoreMatching, TopNeurons
from corematching.runtime import FAMILIES, attach, check_model, find_family
from tests.models import FAMILIES as TINY
from tests.models import TEXT, VISION_FAMILIES, build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate
from tests.runtime.test_families import fingerprint

NEURONS = TestMethod(None, RandomNeurons((1,)))
TOKENS = TestMethod(RandomTokens((1,), (1,)))


def tiny(config: str, model: str, **fields):
    made = getattr(transformers, config)(**{**TEXT, **fields})
    return getattr(transformers, model)._from_config(made).eval()


def mixture():
    return tiny("MixtralConfig", "MixtralForCausalLM", num_local_experts=2)


def recurrent():
    return tiny("MambaConfig", "MambaForCausalLM", state_size=4)


def linear_attention():
    model = build("qwen2")
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    return model


def shared_layer():
    model = build("llava")
    layers = model.get_decoder().layers
    layers[3] = layers[2]
    return model


def shared_ffn():
    model = build("llava")
    layers = model.get_decoder().layers
    layers[3].mlp = layers[1].mlp
    return model


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def shared_keys():
    model = build("llama")
    model.config.num_kv_shared_layers = 2
    return model


def chunked():
    model = build("llama")
    model.config.attention_chunk_size = 8
    return model


def cross_attention():
    model = build("llava")
    model.config.text_config.cross_attention_layers = [1]
    return model


def meta():
    return build("llava").to("meta")


def offloaded():
    model = build("llava")
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": "disk"}
    return model


def without_head():
    return build("llava").model


def flexible():
    model = build("llava")
    model.config.text_config._attn_implementation_internal = "flex_attention"
    return model


def speaking():
    model = build("llava")
    model.thinker = build("llava")
    return model


def adapted():
    wrapper = nn.Module()
    wrapper.get_base_model = lambda: build("llava")
    return wrapper


@pytest.mark.parametrize(
    ("make", "method", "words"),
    [
        (mixture, NEURONS, ["MixtralForCausalLM", "mixture of experts", "dense FFN"]),
        (recurrent, NEURONS, ["MambaForCausalLM", "linear_attention", "recurrent"]),
        (linear_attention, NEURONS, ["linear_attention", "full or sliding attention"]),
        (encoder_decoder, NEURONS, ["T5ForConditionalGeneration", "encoder-decoder"]),
        (shared_keys, NEURONS, ["KV sharing", "num_kv_shared_layers"]),
        (chunked, NEURONS, ["chunks of 8"]),
        (cross_attention, TOKENS, ["cross-attention"]),
        (shared_layer, TOKENS, ["one layer as layers 2 and 3", "weights may be shared"]),
        (shared_ffn, NEURONS, ["one FFN as layers 1 and 3", "weights may be shared"]),
        (meta, NEURONS, ["'meta'", "off-loaded", "one device"]),
        (offloaded, NEURONS, ["disk", "one device"]),
        (without_head, NEURONS, ["no generate()"]),
        (flexible, TOKENS, ["flex_attention", "set_attn_implementation('sdpa')"]),
        (
            lambda: build("llama"),
            TOKENS,
            ["LlamaForCausalLM", "image_token_id and video_token_id of LlamaConfig", "score=None"],
        ),
        (lambda: nn.Linear(2, 2), NEURONS, ["Linear", "PreTrainedModel"]),
        (speaking, TOKENS, ["model.thinker"]),
        (adapted, NEURONS, ["model.get_base_model()", "model.merge_and_unload()"]),
        (lambda: torch.compile(build("llava")), TOKENS, ["model._orig_mod"]),
        (lambda: nn.DataParallel(build("llava")), TOKENS, ["model.module"]),
        (
            lambda: build("llava_neox"),
            CATS(),
            ["GPTNeoXMLP has no gate", "TopNeurons())", "TEAL()"],
        ),
        (
            lambda: build("llava_neox"),
            CoreMatching(),
            ["GPTNeoXMLP has no gate", "CoreMatching(neurons=TopNeurons())"],
        ),
    ],
)
def test_refused(make, method, words):
    model = make()
    before = {k: v for k, v in vars(model).items() if callable(v)}
    with pytest.raises(UnsupportedModelError) as error:
        attach(model, method)
    for word in words:
        assert word in str(error.value)
    assert {k: v for k, v in vars(model).items() if callable(v)} == before


@pytest.mark.parametrize("layers", [(3,), (-2,), (2, 1), (1, 1)])
def test_layers_that_the_model_lacks_are_refused(layers):
    with pytest.raises(UnsupportedModelError, match="4 layers"):
        check_model(build("llava"), TestMethod(RandomTokens(layers, (1,))))


def test_activations_before_the_first_layer_are_refused():
    tokens = RandomTokens((-1,), (1,), needs=frozenset({"activations"}))
    with pytest.raises(UnsupportedModelError, match="activations"):
        check_model(build("llava"), TestMethod(tokens))


def test_checking_touches_nothing():
    model = build("llava")
    before = fingerprint(model)
    parts = check_model(model, TOKENS)
    assert fingerprint(model) == before
    assert parts.widths == [96] * 4 and parts.image_ids == (120,)
    assert parts.vision is model.model.vision_tower


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_the_vision_tower_is_found(name):
    parts = check_model(build(name), TOKENS)
    assert isinstance(parts.vision, nn.Module)
    assert not any(m is parts.decoder for m in parts.vision.modules())


def test_every_family_listed_is_tested():
    tested = {tiny.make_config().model_type for tiny in TINY.values()}
    assert {family.model_type for family in FAMILIES} <= tested
    vision = {TINY[name].make_config().model_type for name in VISION_FAMILIES}
    assert find_family("llava").name == "LLaVA-1.5" and find_family("nothing") is None
    for family in FAMILIES:
        assert family.tokens == (family.model_type in vision) and family.neurons


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", CoreMatching(score=None)),
        ("llava", CoreMatching(neurons=None)),
        ("llava_neox", CoreMatching(neurons=TopNeurons())),
        ("llava_neox", CoreMatching(neurons=None)),
        ("llava_neox", TEAL()),
    ],
)
def test_what_the_messages_name_works(name, method):
    model = build(name)
    with method(model) as run:
        generate(model, make_inputs(name, model))
        assert run.report.samples[0].new_tokens


def test_an_image_token_id_can_be_given():
    model = build("llama")
    model.config.image_token_id = 5
    ids = torch.tensor([[7, *[5] * 10, 8, 9]])
    with CoreMatching(keep_tokens=4)(model) as run:
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        sample = run.report.samples[0]
    assert (sample.image_tokens, sample.kept_tokens) == (10, 4)


def test_quantised_weights_can_lose_tokens_but_not_neurons():
    model = build("llava")

    class Quantised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    for layer in model.get_decoder().layers:
        old = layer.mlp.down_proj
        layer.mlp.down_proj = Quantised(old.in_features, old.out_features, bias=False)
    check_model(model, TOKENS)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        attach(model, NEURONS)
