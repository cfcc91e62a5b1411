"""TEAL and CATS: thresholds from the prompt, by hand and on tiny models."""

import json

import pytest
import torch

from corematching.errors import ConfigError
from corematching.methods import method_from_dict, method_from_text
from corematching.model.gate_store import GateStore
from corematching.protocol import NeuronPolicy
from corematching.runtime.prefill.view import FFNObserver
from tests.chosen import neurons_of
from tests.models import build, make_inputs
from tests.policies.views import make_view, show_rows

NAMES = ("teal", "cats")


@pytest.mark.parametrize("name", NAMES)
def test_policies(name):
    method = method_from_text(name)
    assert isinstance(method.neurons, NeuronPolicy) and method.tokens is None
    assert method.neurons.counts(3, 96) == (96, 96, 96) and method.neurons.per_token
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_teal_by_hand():
    activations = torch.tensor([[[9.0, 9, 9, 9], [1, -2, 3, -4], [8, -7, 6, 5]]])
    inputs = torch.tensor([[[9.0, 9], [0.5, -1], [2, 4]]])
    view = make_view(["itt"], activations, inputs=inputs)
    choice = method_from_text("teal:active_ratio=0.5").neurons.choose(view, 4)
    assert choice.indices.tolist() == [[0, 1, 2, 3]] and choice.gate_threshold is None
    stay = activations[:, 1:].abs() >= choice.output_threshold
    assert stay.tolist() == [[[False] * 4, [True] * 4]]
    assert (inputs[:, 1:].abs() >= choice.input_threshold).tolist() == [[[False] * 2, [True] * 2]]
    everything = method_from_text("teal:active_ratio=0.75,token_set=all").neurons.choose(view, 4)
    assert int((activations.abs() >= everything.output_threshold).sum()) == 9


def test_cats_by_hand():
    gate = torch.tensor([[[1.0, -2, 3, -4], [8, -7, 6, 5], [9.0, 9, 9, 9]]])
    view = make_view(["tti"], torch.zeros(1, 3, 4), gate=show_rows(gate))
    choice = method_from_text("cats:active_ratio=0.25").neurons.choose(view, 4)
    assert (gate[:, :2].abs() >= choice.gate_threshold).tolist() == [
        [[False] * 4, [True, True, False, False]]
    ]
    assert choice.input_threshold is None and choice.output_threshold is None
    full = method_from_text("cats:active_ratio=1.0").neurons.choose(view, 4)
    assert full.gate_threshold.tolist() == [0]


@pytest.mark.parametrize("name", NAMES)
def test_a_view_without_the_part_is_refused(name):
    view = make_view(["itt"], torch.zeros(1, 3, 4))
    with pytest.raises(ConfigError, match="in the policy's needs"):
        method_from_text(name).neurons.choose(view, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teal:active_ratio=0", "active_ratio=0"),
        ("cats:active_ratio=2", "active_ratio=2"),
        ("cats:token_set=txt", "did you mean 'text'"),
    ],
)
def test_wrong_parameters(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(text)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_probe_sees_what_the_ffn_computes(family):
    model = build(family)
    mlp = model.model.layers[1].mlp
    probe, seen = FFNObserver(mlp, GateStore()), []
    handles = [
        mlp.register_forward_pre_hook(probe),
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        model(**make_inputs(family, model))
        up = mlp.up_proj(probe.inputs)
    for handle in handles:
        handle.remove()
    gate, last = probe.gate(seen[0]), seen[0].shape[1] - 1
    rows = torch.tensor([[last, 0]]).expand(len(up), -1)
    torch.testing.assert_close(gate(rows) * up[:, [last, 0]], seen[0][:, [last, 0]])
    every = torch.arange(last + 1).expand(len(up), -1)
    torch.testing.assert_close(gate(every) * up, seen[0])
    before, given = probe.inputs, 2 * probe.inputs
    probe.promise(given, lambda: given / 2)
    torch.testing.assert_close(probe.inputs, before)
    torch.testing.assert_close(probe.gate(seen[0])(every) * up, seen[0])
    probe.forget()
    assert probe.inputs is None


@pytest.mark.parametrize("name", NAMES)
def test_passing_everything_is_dense(name):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        dense = model.generate(**inputs, **settings)
        with method_from_text(f"{name}:active_ratio=1.0")(model):
            assert model.generate(**inputs, **settings).equal(dense)


def masked_forward(mlp, choice):
    """The FFN with a choice's thresholds, on single tokens, by masks."""

    def silence(x, threshold):
        return x if threshold is None else x * (x.abs() >= threshold.view(-1, 1, 1))

    def forward(x):
        if x.shape[1] > 1:
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        x = silence(x, choice.input_threshold)
        gate = silence(mlp.act_fn(mlp.gate_proj(x)), choice.gate_threshold)
        return mlp.down_proj(silence(gate * mlp.up_proj(x), choice.output_threshold))

    return forward


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_what_masks_give(name):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad(), method_from_text(f"{name}:active_ratio=0.4")(model) as work:
        ours = model.generate(**inputs, **settings)
        choices = neurons_of(work)
        report = work.report
    assert sorted(choices) == [0, 1, 2, 3]
    share = 0.4 if name == "teal" else (1 + 2 * 0.4) / 3
    assert report.neuron_retention_ratio == pytest.approx(share, abs=0.01)
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.forward = masked_forward(layer.mlp, choices[index])
    with torch.no_grad():
        masked = model.generate(**inputs, **settings)
    assert ours.sequences.equal(masked.sequences)
    for got, expected in zip(ours.logits, masked.logits, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_decodes_as_its_singles(name):
    model = build("llama")
    inputs = make_inputs("llama", model, batch=2)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), method_from_text(name)(model):
        both = model.generate(**inputs, **settings)[:, -4:]
        for row in range(2):
            start = int((inputs["attention_mask"][row] == 0).sum())
            single = {key: value[row : row + 1, start:] for key, value in inputs.items()}
            assert model.generate(**single, **settings)[0, -4:].equal(both[row])
