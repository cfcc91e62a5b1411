"""What policies are shown, and what becomes of their choices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corematching.errors import ConfigError, InputError
from corematching.protocol import (
    NEEDS,
    VISION,
    NeuronChoice,
    NeuronPolicy,
    TokenChoice,
    TokenPolicy,
)
from corematching.runtime import attach, detach
from corematching.runtime import token_count_bias as weights
from tests.models import build, image_mask, make_inputs
from tests.runtime.families import (
    BANNED,
    STEPS,
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
)
from tests.runtime.families import reference as reference_of
from tests.runtime.reference import continue_greedily


@dataclass
class Recorder(TokenPolicy):
    """Keeps what it is shown and every token but some."""

    layers: tuple[int, ...] = (1,)
    needs: frozenset[str] = NEEDS - {VISION}
    drop: tuple[int, ...] = ()
    seen: list = field(default_factory=list)
    probe: object = None

    def drop_after(self, num_layers):
        return self.layers

    def choose(self, view):
        self.seen.append(replace(view))
        if self.probe is not None:
            self.probe(view)
        keep = view.valid.clone()
        keep[:, list(self.drop)] = False
        scores = torch.where(view.image, 1.0, torch.nan)
        return TokenChoice(keep, scores, torch.ones(len(keep)))


@pytest.fixture
def put():
    """`attach`, undone after the test."""
    models = []

    def put(model, tokens=None, neurons=None):
        models.append(model)
        return attach(model, TestMethod(tokens, neurons))

    yield put
    for model in models:
        detach(model)


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def captured(model, inputs, layer):
    """What a layer's parts get and give in a dense run with eager attention."""
    seen = {}
    block = model.get_decoder().layers[layer]
    handles = [
        block.register_forward_hook(
            lambda m, a, k, out: seen.update(
                hidden=out[0] if isinstance(out, tuple) else out,
            ),
            with_kwargs=True,
        ),
        block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(activations=a[0])),
        block.self_attn.register_forward_hook(
            lambda m, a, k, out: seen.update(output=out[0], attention=out[1]), with_kwargs=True
        ),
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, a, k: seen.update(embeddings=a[0] if a else k["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "gemma3_window", "paligemma"]
)
def test_the_view_shows_what_the_layer_computed(name, implementation, put):
    model = build(name, implementation)
    inputs = make_inputs(name, model, batch=2)
    expected = captured(build(name, "eager"), inputs, 2)
    valid = inputs["attention_mask"].bool()
    shown = {}

    def probe(view):
        rows = torch.tensor([[12, 20], [14, view.valid.shape[1] - 1]])
        shown.update(attention=view.attention(rows), contributions=view.contributions())

    tokens = Recorder((2,), probe=probe)
    put(model, tokens)
    forward(model, inputs)
    (view,) = tokens.seen
    assert torch.equal(view.valid, valid) and torch.equal(view.image, image_mask(name, inputs))
    for what in ("activations", "embeddings"):
        torch.testing.assert_close(
            getattr(view, what)[valid], expected[what][valid], rtol=0, atol=1e-5
        )
    if name != "qwen3_vl":  # deepstack features come on top of the layer's output
        torch.testing.assert_close(view.hidden[valid], expected["hidden"][valid], rtol=0, atol=1e-5)
    assert view.down_proj is model.get_decoder().layers[2].mlp.down_proj.weight
    attention = expected["attention"]
    picked = torch.stack([attention[0][:, [12, 20]], attention[1][:, [14, -1]]])
    torch.testing.assert_close(shown["attention"], picked, rtol=0, atol=1e-5)
    bias = getattr(model.get_decoder().layers[2].self_attn.o_proj, "bias", None)
    total = shown["contributions"].sum(1) + (0 if bias is None else bias)
    torch.testing.assert_close(total, expected["output"][:, -1], rtol=0, atol=1e-5)


def test_later_views_show_the_tokens_still_present(put):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    tokens = Recorder((0, 2), drop=(5, 6, 7))
    put(model, tokens)
    forward(model, inputs)
    first, second = tokens.seen
    length = inputs["input_ids"].shape[1]
    assert first.valid.shape[1] == length and second.valid.shape[1] == length - 3
    assert second.activations.shape[:2] == second.embeddings.shape[:2] == second.valid.shape
    assert second.memory is first.memory
    gone = torch.tensor([i for i in range(length) if i not in (5, 6, 7)])
    torch.testing.assert_close(second.embeddings[1], first.embeddings[1, gone])


def test_only_what_is_needed_is_shown(put):
    model = build("llava")
    tokens = Recorder((1,), needs=frozenset())
    put(model, tokens)
    forward(model, make_inputs("llava", model))
    (view,) = tokens.seen
    assert view.activations is view.attention is view.contributions is view.embeddings is None
    assert view.hidden is not None


def test_dropping_before_the_first_layer_shows_the_input(put):
    model = build("llava")
    tokens = Recorder((-1,), needs=frozenset({"embeddings"}))
    put(model, tokens)
    forward(model, make_inputs("llava", model))
    (view,) = tokens.seen
    assert view.layer == -1 and view.hidden is view.embeddings


def test_text_is_kept_whatever_the_policy_says(put):
    @dataclass
    class KeepsNothing(Recorder):
        def choose(self, view):
            return replace(super().choose(view), keep=torch.zeros_like(view.valid))

    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    run = put(model, KeepsNothing())
    logits = forward(model, inputs).logits
    assert logits.shape[1] == 12  # the longer sample's text
    assert [s.kept_tokens for s in run.report.samples] == [0, 0]


def test_the_last_logits_are_the_last_tokens(put):
    model = build("llava")
    inputs = make_inputs("llava", model)
    method = TestMethod(RandomTokens((1,), (1,)))
    expected = reference_of("llava", inputs, method, steps=1)
    run = put(model, method.tokens)
    logits = forward(model, inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] - 16 + run.report.samples[0].kept_tokens
    torch.testing.assert_close(logits[:, -1], expected.logits[:, 0], rtol=0, atol=1e-4)


def test_merged_hidden_states_travel_on(put):
    @dataclass
    class Merger(Recorder):
        def choose(self, view):
            choice = super().choose(view)
            hidden = view.hidden.clone()
            hidden[:, 4] = view.hidden[:, 4:8].mean(1)
            return replace(choice, hidden=hidden)

    model = build("llava")
    inputs = make_inputs("llava", model)
    tokens = Merger((1,), drop=(5, 6, 7))
    put(model, tokens)
    answer = generate(model, inputs)
    hidden, seen = tokens.seen[0].hidden, {}
    block = model.get_decoder().layers[2]
    handle = block.input_layernorm.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    forward(model, inputs)
    handle.remove()
    torch.testing.assert_close(seen["x"][:, 4], hidden[:, 4:8].mean(1))
    dense, prompt = build("llava", "eager"), inputs["input_ids"].shape[1]

    def merge(module, args):
        merged = args[0].clone()
        merged[:, 4] = args[0][:, 4:8].mean(1)
        return (merged, *args[1:])

    dense.get_decoder().layers[2].register_forward_pre_hook(merge)
    kept = torch.tensor([[i not in tokens.drop for i in range(prompt)]])
    assert_same(
        answer, continue_greedily(dense, inputs, STEPS, kept_after={1: kept}, banned=BANNED)
    )


def test_several_images_in_one_prompt(put):
    model = build("llava")
    inputs = make_inputs("llava", model, images=3)
    method = TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,)))
    expected = reference_of("llava", inputs, method)
    run = put(model, method.tokens, method.neurons)
    assert_same(generate(model, inputs), expected)
    assert run.report.samples[0].image_tokens == 48


def test_samples_with_and_without_images_in_one_batch(put):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2, images=[1, 0])
    method = TestMethod(RandomTokens((1,), (1, 2)), RandomNeurons((1, 2)))
    expected = reference_of("llava", inputs, method)
    run = put(model, method.tokens, method.neurons)
    assert_same(generate(model, inputs), expected)
    assert [s.image_tokens for s in run.report.samples] == [16, 0]


def test_two_dimensional_masks_of_flash_attention(put, caplog):
    """Flash attention cannot run here; an attention that takes its masks can."""

    def attend(module, query, key, value, mask, scaling=None, **_):
        assert mask is None or mask.ndim == 2
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        rows, columns = query.shape[2], keys.shape[2]
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        if mask is not None:
            assert mask.shape[1] == columns
            seen = seen & mask[:, None, None, :].bool()
        scores = (query @ keys.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1).nan_to_num(0) @ values).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_stand_in", flash_attention_mask)
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    neurons = RandomNeurons((1, 2))
    plain = TestMethod(RandomTokens((0, 2), (1, 2), 0.6, weighed=False), neurons)
    expected = reference_of("llava", inputs, plain)
    model.config.text_config._attn_implementation_internal = "flash_stand_in"
    weights.warn_once.cache_clear()
    put(model, RandomTokens((0, 2), (1, 2), 0.6), neurons)
    assert_same(generate(model, inputs), expected)  # it cannot add weights to scores
    assert "flash_stand_in cannot add" in caplog.text


def test_neurons_are_chosen_from_the_prompt(put):
    @dataclass
    class Widest(NeuronPolicy):
        seen: list = field(default_factory=list)

        def counts(self, num_layers, width):
            return (width, *[10] * (num_layers - 1))

        def choose(self, view, count):
            self.seen.append(view)
            return NeuronChoice(torch.arange(count).expand(len(view.valid), -1))

    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    neurons, tokens = Widest(), Recorder((1,), drop=(5, 6, 7))
    put(model, tokens, neurons)
    generate(model, inputs)
    length = inputs["input_ids"].shape[1]
    assert [view.layer for view in neurons.seen] == [1, 2, 3]
    assert [view.activations.shape[1] for view in neurons.seen] == [length, length - 3, length - 3]
    assert all(view.hidden is None for view in neurons.seen)


def test_a_choice_of_the_wrong_shape_is_refused_and_leaves_no_hook(put):
    @dataclass
    class Short(Recorder):
        def choose(self, view):
            return replace(super().choose(view), keep=view.valid[:, 1:])

    model = build("llava")
    inputs = make_inputs("llava", model)
    put(model, Short())
    with pytest.raises(ConfigError, match="keep mask"):
        forward(model, inputs)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_labels_are_refused(put):
    model = build("llava")
    inputs = make_inputs("llava", model)
    put(model, Recorder())
    with pytest.raises(InputError, match="labels"):
        forward(model, {**inputs, "labels": inputs["input_ids"]})
