"""Neurons ranked over the tokens that go on: the two sides of the method together."""

import pytest
import torch

from corematching import CoreMatching, Griffin, NeuronRule, Ratio, Sparsifier, TokenRule, Uniform
from corematching.errors import ConfigError
from corematching.policy import Norm
from corematching.protocol import ACTIVATIONS, KEPT
from tests.models import build, image_mask, make_inputs


def test_needs():
    assert NeuronRule(Griffin(over="kept"), Uniform(0.5)).needs == {ACTIVATIONS, KEPT}
    ours = CoreMatching(over="kept")
    assert ours.neurons.score == Griffin(over="kept") and ours.tokens == CoreMatching().tokens
    assert CoreMatching().neurons.score == Griffin(over="all")
    with pytest.raises(ConfigError, match="did you mean 'kept'"):
        CoreMatching(over="keept")


@pytest.mark.parametrize("after", [(1,), (0, 2)])
def test_layers_before_the_cut_are_ranked_over_core_tokens(after):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    tokens = TokenRule(Norm(), Ratio(0.5), after)
    methods = [
        Sparsifier(tokens, NeuronRule(Griffin(over=over), Uniform(0.5, multiple=1)))
        for over in ("all", "kept")
    ]
    activations = []
    down = model.model.language_model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: activations.append(args[0]))
    found = []
    for method in methods:
        with torch.no_grad(), method(model) as work:
            model(**inputs)
            found.append(work._engine.records[-1].selection.neurons)
            masks = [torch.tensor(sample.keep_mask) for sample in work.report.samples]
    handle.remove()
    alive = inputs["attention_mask"].bool()
    image = image_mask("llava", inputs)
    for row, mask in enumerate(masks):
        alive[row, image[row]] = mask
    seen = next(a for a in activations if a.shape[:2] == image.shape)  # not the FFN's own check
    units = torch.nn.functional.normalize(seen, dim=-1)
    for over, neurons in zip(("all", "kept"), found, strict=True):
        tokens_of = inputs["attention_mask"].bool() if over == "all" else alive
        score = (units * tokens_of.unsqueeze(-1)).norm(dim=1)
        best = score.topk(48, dim=1).indices.sort(dim=1).values
        assert neurons[0].indices.equal(best)
        assert sorted(neurons) == [0, 1, 2, 3]
    assert not found[0][0].indices.equal(found[1][0].indices)
    for layer in range(after[-1] + 1, 4):  # behind the cut there is no one else
        assert found[0][layer].indices.equal(found[1][layer].indices)


def test_a_prompt_without_an_image_keeps_all():
    model = build("llava")
    inputs = make_inputs("llava", model, images=0)
    with torch.no_grad(), CoreMatching(over="kept", layer=1)(model) as work:
        model(**inputs)
        assert work._engine.records[-1].selection.neurons
