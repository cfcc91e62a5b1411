"""Neurons ranked over the tokens that go on: the two sides of the method together."""

import pytest
import torch

from corematching import (
    CoreMatching,
    GateThreshold,
    GriffinScore,
    NeuronRule,
    Ratio,
    Sparsifier,
    TokenRule,
    TopNeurons,
    Uniform,
)
from corematching.errors import ConfigError
from corematching.policies import Norm
from corematching.protocol import ACTIVATIONS, GATE, KEPT
from tests.chosen import neurons_of
from tests.models import build, image_mask, make_inputs


def test_needs():
    assert NeuronRule(GriffinScore(token_set="kept"), Uniform(0.5)).needs == {ACTIVATIONS, KEPT}
    ours = TopNeurons(score=GriffinScore(token_set="kept"))
    assert ours.needs == GateThreshold(among=ours).needs - {GATE} == {ACTIVATIONS, KEPT}
    assert TopNeurons().needs == {ACTIVATIONS}
    with pytest.raises(ConfigError, match="did you mean 'kept'"):
        GriffinScore(token_set="keept")


@pytest.mark.parametrize("after", [(1,), (0, 2)])
def test_layers_before_the_cut_are_ranked_over_core_tokens(after):
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    tokens = TokenRule(Norm(), Ratio(0.5), after)
    methods = [
        Sparsifier(tokens, NeuronRule(GriffinScore(token_set=over), Uniform(0.5, multiple=1)))
        for over in ("all", "kept")
    ]
    activations = []
    down = model.model.language_model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: activations.append(args[0]))
    found = []
    for method in methods:
        with torch.no_grad(), method(model) as work:
            model(**inputs)
            found.append(neurons_of(work))
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
    neurons = TopNeurons(score=GriffinScore(token_set="kept"))
    with torch.no_grad(), CoreMatching(layer=1, neurons=neurons)(model) as work:
        model(**inputs)
        assert neurons_of(work)
