"""Core neurons gated token by token: thresholds by hand, decoding against masks, counts."""

import json

import pytest
import torch

from corematching import (
    CoreMatching,
    GateThreshold,
    GriffinScore,
    Magnitude,
    NeuronRule,
    TopNeurons,
    Uniform,
)
from corematching.errors import ConfigError
from corematching.methods import Sparsifier, gate_threshold, method_from_dict, method_from_text
from corematching.protocol import ACTIVATIONS, GATE, KEPT, NeuronPolicy
from tests.chosen import neurons_of
from tests.models import build, make_inputs
from tests.policies.views import make_view, show_rows


def test_on_by_default_and_not_in_the_paper():
    for method in (CoreMatching(), method_from_text("corematching")):
        assert isinstance(method.neurons, GateThreshold) and method.neurons.decode_ratio < 0.75
    for method in (CoreMatching.paper(), method_from_text("random")):
        assert type(method.neurons) is NeuronRule and method.neurons.decode_ratio == 1
    assert TopNeurons().decode_ratio == 1


def test_policy():
    method = method_from_text("corematching:neurons=gate(0.25,among=top(0.5))")
    rule, plain = method.neurons, TopNeurons(0.5)
    assert isinstance(rule, NeuronPolicy) and rule.per_token and rule.decode_ratio == 0.5
    assert rule == GateThreshold(0.25, among=plain)
    assert rule.counts(32, 96) == plain.counts(32, 96)
    assert GateThreshold().counts(3, 96) == (96,) * 3
    assert rule.needs == GateThreshold().needs == {ACTIVATIONS, GATE}
    kept = TopNeurons(score=GriffinScore(token_set="kept"))
    assert GateThreshold(among=kept).needs == {ACTIVATIONS, GATE, KEPT}
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert GateThreshold.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def gate(score, ratio, **params):
    """The gate's rule among neurons that a score chose."""
    return GateThreshold(among=NeuronRule(score, Uniform(ratio, multiple=1)), **params)


def test_by_hand():
    # neurons 1 and 3 are core; their gates on the text tokens are -2, -4, 7, 5
    activations = torch.tensor([[[0.0, 9, 0, -9], [0, 9, 1, 9], [1, 0, 0, 0]]])
    values = torch.tensor([[[99.0, -2, 99, -4], [99, 7, 99, 5], [99, 99, 99, 99]]])
    view = make_view(["tti"], activations, gate=show_rows(values))
    rule = gate(Magnitude(top_ratio=0.5), 0.5, active_ratio=0.5)
    choice = rule.choose(view, 2)
    assert choice.gate_threshold is None  # it waits for the first token
    assert choice.materialize() is choice and choice.later is None
    assert choice.indices.tolist() == [[1, 3]] and choice.mean is None
    fires = values[0, :2, [1, 3]].abs() >= choice.gate_threshold
    assert fires.tolist() == [[False, False], [True, True]]
    assert choice.input_threshold is None and choice.output_threshold is None
    # the image token's gates (99, 99) count too: the largest half are 99, 99, 7
    every = gate(Magnitude(top_ratio=0.5), 0.5, active_ratio=0.5, token_set="all")
    assert 5 < float(every.choose(view, 2).materialize().gate_threshold) <= 7
    full = gate(Magnitude(top_ratio=0.5), 0.5, active_ratio=1.0).choose(view, 2).materialize()
    assert full.gate_threshold.tolist() == [0]


def test_large_gates_do_not_wait(monkeypatch):
    view = make_view(["tt"], torch.ones(1, 2, 4), gate=show_rows(torch.rand(1, 2, 4)))
    rule = gate(Magnitude(top_ratio=0.5), 0.5, active_ratio=0.5)
    monkeypatch.setattr(gate_threshold, "MOST_KEPT", 7)
    choice = rule.choose(view, 2)
    assert choice.later is None and choice.gate_threshold.shape == (1,)


def test_a_layer_that_keeps_all_is_gated_without_a_score():
    class Unused(GriffinScore):
        def score(self, view):
            raise AssertionError("no choice to make")

    values = torch.tensor([[[1.0, -2, 3, -4]], [[-8.0, 7, 6, 5]]])
    view = make_view(["t", "t"], torch.zeros(2, 1, 4), gate=show_rows(values))
    for rule in (gate(Unused(), 1.0, active_ratio=0.5), GateThreshold(0.5)):
        check_halves(rule.choose(view, 4).materialize(), values)


def check_halves(choice, gate):
    assert choice.indices.tolist() == [[0, 1, 2, 3]] * 2 and choice.mean is None
    assert (gate[:, 0].abs() >= choice.gate_threshold[:, None]).tolist() == [
        [False, False, True, True],
        [True, True, False, False],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate(0)", r"active_ratio=0: give a ratio in \(0, 1\]"),
        ("gate(1.5)", "active_ratio=1.5"),
        ("gate(true)", "active_ratio=True"),
        ("gate(activ_ratio=0.5)", "did you mean 'active_ratio'"),
        ("gate(token_set=txt)", "did you mean 'text'"),
        ("gate(among=gate)", "give TopNeurons, a NeuronRule or None"),
    ],
)
def test_wrong_text_is_refused_with_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(f"corematching:neurons={text}")


def test_a_view_without_a_gate_is_refused():
    with pytest.raises(ConfigError, match="in the policy's needs"):
        GateThreshold().choose(make_view(["itt"], torch.rand(1, 3, 4)), 4)


def masked_forward(mlp, choice):
    """The FFN with a choice, on single tokens, by masks over all neurons."""
    core = torch.zeros(len(choice.indices), mlp.gate_proj.out_features)
    core = core.scatter(1, choice.indices, 1.0)[:, None]

    def forward(x):
        gate = mlp.act_fn(mlp.gate_proj(x))
        if x.shape[1] > 1:
            return mlp.down_proj(gate * mlp.up_proj(x))
        gate = gate * (gate.abs() >= choice.gate_threshold.view(-1, 1, 1))
        neurons = gate * mlp.up_proj(x) * core
        if choice.mean is not None:
            neurons = neurons + choice.mean[:, None]
        return mlp.down_proj(neurons)

    return forward


SETTINGS = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_decoding_is_what_masks_give(engine):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    method = CoreMatching(
        score=None, neurons=GateThreshold(0.4, among=TopNeurons(0.5, dense_first=1, dense_last=1))
    )
    with torch.no_grad(), method(model, engine=engine) as work:
        ours = model.generate(**inputs, **SETTINGS)
        choices = neurons_of(work)
        report = work.report
    assert [choices[i].indices.shape[1] for i in range(4)] == [96, 48, 48, 96]
    assert report.neurons == [round(0.6 * count) for count in (96, 48, 48, 96)]
    assert choices[0].mean is None and choices[1].mean is not None
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.forward = masked_forward(layer.mlp, choices[index])
    with torch.no_grad():
        masked = model.generate(**inputs, **SETTINGS)
    assert ours.sequences.equal(masked.sequences)
    for got, expected in zip(ours.logits, masked.logits, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def count_firing(model, choices, inputs):
    """Rows that the decode steps need: every core gate, up and down of what fires."""
    rows = []

    def watch(choice):
        def see(module, args, output):
            if output.shape[1] == 1:
                gate = torch.nn.functional.silu(output)[0, 0, choice.indices[0]]
                fired = int((gate.abs() >= choice.gate_threshold).sum())
                rows.append(choice.indices.shape[1] + 2 * fired)

        return see

    layers = model.model.layers
    handles = []
    for index, layer in enumerate(layers):
        layer.mlp.forward = masked_forward(layer.mlp, choices[index])
        handles.append(layer.mlp.gate_proj.register_forward_hook(watch(choices[index])))
    with torch.no_grad():
        model.generate(**inputs, **SETTINGS)
    for handle in handles:
        handle.remove()
    return sum(rows)


def test_bytes_are_those_of_the_gate_and_of_what_fired():
    model = build("llama")
    inputs = make_inputs("llama", model)
    method = CoreMatching(
        score=None, neurons=GateThreshold(0.4, among=TopNeurons(0.5, dense_first=1, dense_last=1))
    )
    with torch.no_grad(), method(model) as work:
        model.generate(**inputs, **SETTINGS)
        choices, report = neurons_of(work), work.report
    if not report.kernel.startswith("native"):
        pytest.skip("no compiled kernels here")
    assert report.decode_steps == 3
    row = 4 * model.config.hidden_size
    ffns = sum(p.numel() * 4 for layer in model.model.layers for p in layer.mlp.parameters())
    read = report.decode_bytes - (report.dense_decode_bytes - ffns)
    assert read == pytest.approx(count_firing(model, choices, inputs) * row / 3, abs=8)


def test_passing_everything_is_the_plain_rule():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    found = []
    for neurons in (TopNeurons(0.5), GateThreshold(1.0, among=TopNeurons(0.5))):
        with torch.no_grad(), CoreMatching(neurons=neurons)(model):
            found.append(model.generate(**inputs, **SETTINGS).sequences)
    assert found[0].equal(found[1])


def test_without_an_answer_of_its_own_the_rule_composes():
    rule = gate(GriffinScore(), 0.5, active_ratio=0.3)
    method = Sparsifier(neurons=rule)
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
