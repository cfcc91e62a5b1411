"""What `run.choices` says, against policies whose choices are known."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import corematching
from corematching.errors import ConfigError, InputError, InvalidTensorError
from corematching.methods import method_from_text
from corematching.protocol import NeuronChoice
from corematching.runtime import attach, detach
from tests.chosen import neurons_of
from tests.models import build, image_mask, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate
from tests.runtime.turns import LateNeurons, LimitedNeurons

SEEDS = (1, 2)


def make_method(neurons=RandomNeurons, layers=(0, 2)):
    return TestMethod(RandomTokens(layers, SEEDS, share=0.6), neurons(SEEDS, compensated=True))


def start(method, batch=2):
    model = build("llava")
    return model, make_inputs("llava", model, batch=batch), attach(model, method)


@pytest.mark.parametrize("layers", [(0, 2), (-1, 1)])
def test_masks_are_what_the_policy_kept(layers):
    method = make_method(layers=layers)
    model, inputs, run = start(method)
    generate(model, inputs)
    image = image_mask("llava", inputs)
    valid, kept = inputs["attention_mask"].bool(), method.tokens.kept_after(image)
    assert len(run.choices) == 2
    for row, (sample, report) in enumerate(zip(run.choices, run.report.samples, strict=True)):
        assert sample.image.equal(image[row])
        assert sample.cut_layers == report.cut_layers == list(layers)
        for cut in sample.cuts:
            assert cut.prompt_mask.equal(kept[cut.layer][row] & valid[row]) and cut.lowest == 0.5
        assert sample.prompt_mask.equal(sample.cuts[-1].prompt_mask)
        assert sample.keep_mask.tolist() == report.keep_mask
        assert sample.scores[image[row]].tolist() == report.scores
        assert sample.scores[~image[row]].isnan().all()


@pytest.mark.parametrize("neurons", [RandomNeurons, LateNeurons, LimitedNeurons])
@pytest.mark.parametrize("steps", [1, 3])
def test_neurons_are_what_the_policy_chose(neurons, steps):
    method = make_method(neurons)
    model, inputs, run = start(method)
    generate(model, inputs, steps)
    for row, sample in enumerate(run.choices):
        assert len(sample.neurons) == len(sample.neuron_indices) == 4
        for layer, chosen in enumerate(sample.neurons):
            count = method.neurons.counts(4, 96)[layer]
            if chosen is None:
                assert neurons is not LimitedNeurons and layer == 0 and count == 96
                assert sample.neuron_indices[layer] is None
                continue
            expected = RandomNeurons.pick(method.neurons, layer, 96, count)
            assert chosen.indices.equal(expected.indices[row])
            assert chosen.indices.equal(sample.neuron_indices[layer])
            assert chosen.mean.equal(expected.mean[row])
            assert chosen.input_threshold is None
            limits = (chosen.gate_threshold, chosen.output_threshold)
            if neurons is LimitedNeurons:
                seed = SEEDS[row]
                assert limits == pytest.approx((0.02 * seed, 0.01 * seed))
            else:
                assert limits == (None, None)


def test_a_dense_run_keeps_everything():
    model, inputs, run = start(TestMethod())
    generate(model, inputs)
    for row, sample in enumerate(run.choices):
        assert sample.prompt_mask.equal(inputs["attention_mask"][row].bool())
        assert sample.cuts == () and sample.neuron_indices == [None] * 4


def test_the_text_of_choices_is_short():
    model, inputs, run = start(method_from_text("corematching:keep_tokens=4,layer=1"), batch=1)
    generate(model, inputs)
    assert repr(run.choices[0]) == (
        "Choices(4 of 16 image tokens, cut_layers=[1], neurons in 4 of 4 layers)"
    )
    assert isinstance(run.choices[0], corematching.Choices)


def test_beams_share_a_sample():
    model, inputs, run = start(TestMethod(RandomTokens((1,), (1, 1, 2, 2), share=0.6)))
    model.generate(**inputs, max_new_tokens=3, num_beams=2)
    assert len(run.choices) == len(run.report.samples) == 2
    for sample, report in zip(run.choices, run.report.samples, strict=True):
        assert sample.keep_mask.tolist() == report.keep_mask


def test_nothing_has_run():
    _, _, run = start(make_method())
    with pytest.raises(InputError, match="nothing has run yet"):
        _ = run.choices


@torch.no_grad()
def test_a_further_turn_shows_its_conversation():
    model, inputs, run = start(make_method())
    cache = model(**inputs).past_key_values
    first, neurons = run.choices, neurons_of(run)
    other = make_inputs("llava", model, batch=2, seed=1)
    model(**other)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    model(input_ids=torch.full((3, 2), 9), past_key_values=cache)
    assert run.report.continued
    assert len(run.choices) == 3
    for row, sample in zip((1, 0, 1), run.choices, strict=True):
        assert sample.prompt_mask.equal(first[row].prompt_mask)
        assert sample.image.equal(first[row].image)
        for layer, chosen in neurons.items():
            assert sample.neurons[layer].indices.equal(chosen.indices[row])
            assert sample.neurons[layer].mean.equal(chosen.mean[row])


@torch.no_grad()
def test_a_conversation_off_the_record_is_refused():
    model, inputs, run = start(make_method())
    cache = model(**inputs).past_key_values
    for _ in range(16):
        model(**inputs)
    model(input_ids=torch.full((2, 2), 9), past_key_values=cache)
    with pytest.raises(InputError, match="no longer on record"):
        _ = run.choices
    assert run.report.continued


@torch.no_grad()
def test_earlier_runs_let_go_and_copies_stay():
    model, inputs, run = start(make_method())
    made = []

    def pick(layer, width, count):
        choice = RandomNeurons.pick(run.method.neurons, layer, width, count)
        made.append(weakref.ref(choice.indices))
        return choice

    run.method.neurons.pick = pick
    model(**inputs)
    first = run.choices
    first[0].neurons[1].indices.add_(1)  # the reader's own
    again = run.choices[0].neurons[1].indices
    assert again.equal(first[0].neurons[1].indices - 1)
    model(**inputs)
    gc.collect()
    assert sum(ref() is not None for ref in made) == 3, "one run has its three layers' choices"
    assert again.equal(first[0].neurons[1].indices - 1)


@pytest.mark.parametrize("text", ["corematching", "griffin", "teal", "cats"])
def test_choices_hold_no_activations(text):
    model, inputs, run = start(method_from_text(text))
    seen = []
    layers = model.get_decoder().layers
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: seen.append(weakref.ref(args[0]))
        )
        for layer in layers
    ]
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert len(seen) >= len(layers) and all(ref() is None for ref in seen)
    assert any(layer is not None for layer in run.choices[0].neurons)


def test_choices_outlive_the_method():
    model, inputs, run = start(make_method())
    generate(model, inputs)
    before = neurons_of(run)
    detach(model)
    for layer, choice in neurons_of(run).items():
        assert choice.indices.equal(before[layer].indices)


class Broken(RandomNeurons):
    """Chooses something else than it is asked for, when it is asked late."""

    def choose(self, view, count):
        return NeuronChoice(later=lambda: self.found(view.layer, count))

    def found(self, layer, count):
        return {"indices": self.pick(layer, 96, count).indices.flip(1)}


class Nothing(Broken):
    def found(self, layer, count):
        return {}


@pytest.mark.parametrize(
    ("neurons", "error"), [(Broken, InvalidTensorError), (Nothing, ConfigError)]
)
def test_late_choices_are_checked_before_they_are_shown(neurons, error):
    model, inputs, run = start(make_method(neurons))
    generate(model, inputs, 1)
    with pytest.raises(error):
        _ = run.choices
