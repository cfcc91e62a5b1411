"""The product's own methods on left-padded batches: choices, means and counts are each sample's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from corematching import (
    CoreMatching,
    GateThreshold,
    GriffinScore,
    Knee,
    Ratio,
    Sparsifier,
    TopNeurons,
)
from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.methods.staged import StagedRule
from corematching.policies.token_scores import TextOverlap
from corematching.protocol import TokenPolicy
from tests.models import LAYERS, WIDTH, build, image_mask, make_inputs
from tests.runtime.test_families import single

STEPS = 4
IMAGES, WORDS = [1, 2, 1], [9, 17, 12]
HALF = TopNeurons(0.5, dense_first=1, dense_last=0)
KEPT = TopNeurons(0.5, dense_first=1, dense_last=0, score=GriffinScore(token_set="kept"))
METHODS = {
    "default": CoreMatching(),
    "staged": CoreMatching(0.15),
    "paper": CoreMatching.paper(),
    "compensating": CoreMatching(neurons=HALF),
    "compensating and gated": CoreMatching(neurons=GateThreshold(0.5, among=HALF)),
    "staged and compensating": CoreMatching(0.15, neurons=KEPT),
    "compensating paper": CoreMatching.paper(compensate=True),
    "proportional knee": CoreMatching(budget=Knee(cover=0.9), layer=1, neurons=None),
}
COMPENSATING = [name for name in METHODS if "compensating" in name]


def run(model, inputs, method, engine, **options):
    """Tokens, logits (B, steps, V), what the cache remembers, and which tokens were kept."""
    with torch.no_grad(), method(model, engine=engine) as work:
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        masks = [sample.keep_mask for sample in work.report.samples]
    return out, torch.stack(out.logits, 1), pruned_prompt_of(out.past_key_values), masks


@pytest.fixture(scope="module")
def batch():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=3, images=IMAGES, text_lengths=WORDS)
    return model, inputs


def alone(inputs, sample):
    return single("llava", inputs, sample, IMAGES)


def close(left, right, tolerance=1e-4):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_singles(name, engine, batch):
    (model, inputs), method = batch, METHODS[name]
    out, logits, memory, masks = run(model, inputs, method, engine)
    for sample in range(3):
        own, expected, theirs, (mask,) = run(model, alone(inputs, sample), method, engine)
        assert masks[sample] == mask
        if name in COMPENSATING:
            assert any(choice.materialize().mean is not None for choice in theirs.neurons.values())
        close(logits[sample], expected[0])
        assert torch.equal(out.sequences[sample, -STEPS:], own.sequences[0, -STEPS:])
        real = memory.valid[sample]
        if theirs.log_counts is not None:
            close(memory.log_counts[sample][real], theirs.log_counts[0])
        for layer, choice in theirs.neurons.items():
            ours = memory.neurons[layer].materialize()
            assert torch.equal(ours.indices[sample], choice.materialize().indices[0])
            if choice.mean is not None:
                close(ours.mean[sample], choice.mean[0], 1e-5)
            if choice.gate_threshold is not None:
                close(ours.gate_threshold[sample], choice.gate_threshold[0], 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_engines_agree(name, batch):
    model, inputs = batch
    ours, logits, _, masks = run(model, inputs, METHODS[name], "auto")
    theirs, others, _, found = run(model, inputs, METHODS[name], "torch")
    assert masks == found and torch.equal(ours.sequences, theirs.sequences)
    close(logits, others)


@pytest.mark.parametrize("name", ["default", "staged", "staged and compensating"])
def test_a_padded_batch_in_a_static_cache_is_the_same(name, batch):
    model, inputs = batch
    plain, logits, _, _ = run(model, inputs, METHODS[name], "torch")
    other, others, _, _ = run(model, inputs, METHODS[name], "torch", cache_implementation="static")
    assert torch.equal(plain.sequences, other.sequences)
    close(logits, others)


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("active_ratio", [None, 0.5])
def test_means_are_over_each_sample_s_own_tokens(active_ratio, engine, batch):
    model, inputs = batch
    seen, handles = [], []
    for layer in model.get_decoder().layers:
        keep = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        handles.append(keep)
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    half = TopNeurons(0.5, dense_first=0, dense_last=0, multiple=1)
    gated = half if active_ratio is None else GateThreshold(active_ratio, among=half)
    method = CoreMatching(score=None, neurons=gated)
    _, _, memory, _ = run(model, inputs, method, engine)
    assert len(memory.neurons) == len(seen) == LAYERS
    valid = inputs["attention_mask"].bool()
    for layer, choice in memory.neurons.items():
        choice = choice.materialize()
        dropped = torch.ones(len(valid), WIDTH, dtype=torch.bool)
        dropped.scatter_(1, choice.indices, False)
        assert dropped.sum(1).tolist() == [WIDTH // 2] * len(valid)
        for sample, own in enumerate(valid):
            mean = seen[layer][sample][own].mean(0)
            close(choice.mean[sample], torch.where(dropped[sample], mean, 0.0), 1e-5)


class Recorder(TokenPolicy):
    """Another policy, and the views that it got, with its choices."""

    proportional = True

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    @property
    def needs(self):
        return self.inner.needs

    def drop_after(self, num_layers):
        return self.inner.drop_after(num_layers)

    def choose(self, view):
        choice = self.inner.choose(view)
        self.seen.append((view, choice))
        return choice


def standing_for(seen, sample, length):
    """Which columns of the prompt each one stands for behind all cuts, by the nearest kept one."""
    stands = {column: {column} for column in range(length)}
    for view, choice in seen:
        origin, image = view.origin[sample].tolist(), view.image[sample]
        kept = (image & choice.keep[sample]).nonzero()[:, 0].tolist()
        for row in (image & ~choice.keep[sample]).nonzero()[:, 0].tolist():
            own = view.hidden[sample, row][None]
            likeness = F.cosine_similarity(own, view.hidden[sample, kept], dim=-1)
            nearest = kept[int(likeness.argmax())]
            stands[origin[nearest]] |= stands.pop(origin[row])
    return stands


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("after", [(1,), (0, 2), (0, 1, 2)])
def test_after_several_cuts_each_token_counts_for_all_that_went_to_it(after, engine, batch):
    model, inputs = batch
    budgets = tuple(Ratio(ratio, cover=0.5) for ratio in (0.6, 0.3, 0.15)[-len(after) :])
    rule = Recorder(StagedRule(TextOverlap(), budgets, after, proportional=True))
    _, _, memory, _ = run(model, inputs, Sparsifier(tokens=rule, neurons=None), engine)
    assert [view.layer for view, _ in rule.seen] == list(after)
    image, length = image_mask("llava", inputs), inputs["input_ids"].shape[1]
    for sample, valid in enumerate(inputs["attention_mask"].bool()):
        stands = standing_for(rule.seen, sample, length)
        left = sorted(column for column in stands if valid[column])
        expected = torch.tensor([float(len(stands[column])) for column in left])
        found = memory.log_counts[sample][memory.valid[sample]].exp()
        close(found, expected)
        assert round(float(found.sum())) == int(valid.sum())
        assert int((expected > 1).sum()) > 1 and not any(
            len(stands[column]) > 1 for column in left if not image[sample, column]
        )


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_of_nan_changes_no_other(name, engine, batch):
    model, inputs = batch
    broken = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    broken["pixel_values"][0] = torch.nan
    expected, logits, _, masks = run(model, inputs, METHODS[name], engine)
    out, others, _, found = run(model, broken, METHODS[name], engine)
    assert masks[1:] == found[1:]
    assert torch.equal(out.sequences[1:], expected.sequences[1:])
    close(others[1:], logits[1:])
    assert others[0].isnan().any()
