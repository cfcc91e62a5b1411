"""The field's methods: their published defaults, and one run of each on a tiny model."""

import json
import math

import pytest
import torch

from corematching import (
    Attention,
    CoreInferScore,
    Count,
    DenseEnds,
    GriffinScore,
    NeuronRule,
    ProjectionScore,
    Ratio,
    TokenRule,
    Uniform,
)
from corematching.errors import ConfigError
from corematching.methods import method_from_dict, method_from_text
from corematching.methods.sparsevlm import RecyclingRule
from corematching.methods.staged import StagedRule, make_stages
from corematching.policy.token_scores.cdpruner import CDPrunerScore
from corematching.policy.token_scores.divprune import DivPruneScore
from corematching.policy.token_scores.rater_attention import RaterAttention
from corematching.policy.token_scores.stride import StrideScore
from corematching.protocol import TokenPolicy
from corematching.runtime import is_attached
from tests.models import FAMILIES, build, image_mask, make_inputs
from tests.policy.views import make_view

TOKENS = ("stride", "fastv", "pyramiddrop", "sparsevlm", "divprune", "cdpruner", "projection")
NEURONS = ("coreinfer", "griffin")
IMAGES = FAMILIES["llava"].image_tokens
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return build("llava")


def run(method, model, inputs, steps=3):
    with torch.no_grad(), method(model) as run:
        tokens = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False
        )
    assert not is_attached(model)
    return tokens[:, inputs["input_ids"].shape[1] :], run.report


def test_published_defaults_of_the_token_methods():
    rules = {name: method_from_text(name).tokens for name in TOKENS}
    assert rules["fastv"] == TokenRule(Attention(), Ratio(0.5), (1,))
    assert rules["divprune"] == TokenRule(DivPruneScore(0.098), Ratio(0.098), (-1,))
    assert rules["cdpruner"] == TokenRule(CDPrunerScore(64 / 576), Ratio(64 / 576), (-1,))
    assert rules["stride"] == TokenRule(StrideScore(0.3), Ratio(0.3), (0.3,))
    assert rules["projection"] == TokenRule(ProjectionScore(), Ratio(0.3), (0.3,))
    assert rules["pyramiddrop"].stages(32) == {
        8: Ratio(0.5),
        16: Ratio(0.25),
        24: Ratio(0.125),
    }
    assert rules["sparsevlm"].stages(32) == {
        2: Ratio(300 / 576),
        6: Ratio(200 / 576),
        15: Ratio(110 / 576),
    }
    assert rules["sparsevlm"].score == RaterAttention() and rules["sparsevlm"].recycled == 0.3
    assert all(method_from_text(name).neurons is None for name in TOKENS)


def test_published_defaults_of_the_neuron_methods():
    coreinfer, griffin = (method_from_text(name) for name in NEURONS)
    schedule = DenseEnds(0.4, first=6 / 32, last=5 / 32, multiple=1)
    assert coreinfer.neurons == NeuronRule(CoreInferScore(top_ratio=0.2), schedule)
    assert coreinfer.neurons.counts(32, 11008) == (11008,) * 6 + (4403,) * 21 + (11008,) * 5
    assert griffin.neurons == NeuronRule(GriffinScore(), Uniform(0.5, multiple=1))
    assert griffin.neurons.counts(32, 11008) == (5504,) * 32
    assert coreinfer.tokens is None and griffin.tokens is None


@pytest.mark.parametrize("name", TOKENS)
def test_keep_is_a_ratio_or_a_count(name):
    ratio = method_from_text(f"{name}:keep_ratio=0.25")
    counted = method_from_text(f"{name}:keep_tokens=12")
    assert ratio.tokens.budget == Ratio(0.25) and counted.tokens.budget == Count(12)
    if isinstance(ratio.tokens, StagedRule):
        kept = [budget.keep_tokens for budget in counted.tokens.budgets]
        assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("name", TOKENS + NEURONS)
def test_round_trip_through_json(name):
    method = method_from_text(name)
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize(
    ("name", "kept_after"),
    [
        ("stride:keep_ratio=0.25", {0: 4}),
        ("stride:keep_ratio=0.25,layer=-1", {-1: 4}),
        ("fastv", {1: 8}),
        ("pyramiddrop", {0: 8, 1: 4, 2: 2}),
        ("pyramiddrop:keep_tokens=[12,3],layer=[0,2]", {0: 12, 2: 3}),
        # 11 of 16 left out: floor(.3 * 11) + 1 = 4 merged into one; then 13 of 16 - 6
        ("sparsevlm:keep_tokens=[5,3],layer=[0,2]", {0: 6, 2: 4}),
        ("sparsevlm:keep_tokens=[5,3],layer=[0,2],recycled=0", {0: 5, 2: 3}),
        ("divprune:keep_ratio=0.25", {-1: 4}),
        ("cdpruner:keep_tokens=5", {-1: 5}),
        ("projection:keep_ratio=0.5,layer=1", {1: 8}),
    ],
)
def test_token_methods_run(model, name, kept_after):
    inputs = make_inputs("llava", model, batch=2)
    method = method_from_text(name)
    tokens, report = run(method, model, inputs)
    assert tokens.shape == (2, 3)
    for sample in report.samples:
        assert dict(zip(sample.cut_layers, sample.kept_after, strict=True)) == kept_after
        assert sample.kept_tokens == list(kept_after.values())[-1] < sample.image_tokens == IMAGES
        assert sample.prefill_flops < sample.dense_prefill_flops
        assert sample.kv_bytes < sample.dense_kv_bytes


@pytest.mark.parametrize("name", [*TOKENS, "random"])
def test_a_batch_chooses_as_its_singles(model, name):
    inputs = make_inputs("llava", model, batch=2)
    method = method_from_text(name)
    tokens, report = run(method, model, inputs)
    for row in range(2):
        start = int((inputs["attention_mask"][row] == 0).sum())
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        single["input_ids"] = single["input_ids"][:, start:]
        single["attention_mask"] = single["attention_mask"][:, start:]
        alone, its_report = run(method, model, single)
        assert its_report.samples[0].keep_mask == report.samples[row].keep_mask
        assert alone.equal(tokens[row : row + 1])


@pytest.mark.parametrize("name", TOKENS)
def test_keeping_all_is_dense(model, name):
    inputs = make_inputs("llava", model, batch=2)
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1]
    method = method_from_text(f"{name}:keep_ratio=1")
    with torch.no_grad(), method(model):
        kept = model(**inputs).logits[:, -1]
    torch.testing.assert_close(kept, dense, atol=1e-5, rtol=1e-5)


def test_what_the_runtime_shows_is_what_the_embeddings_are(model):
    """DivPrune and CDPruner choose by the projector's output and the embedded question."""
    inputs = make_inputs("llava", model)
    image = image_mask("llava", inputs)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"].clamp(max=127))
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
        features = getattr(features, "pooler_output", features)
    features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
    embeddings[image] = features
    view = make_view(
        ["".join("i" if x else "t" for x in image[0])], embeddings=embeddings, layer=-1
    )
    for name in ("divprune:keep_tokens=4", "cdpruner:keep_tokens=4"):
        method = method_from_text(name)
        expected = method.tokens.choose(view).keep[image].tolist()
        assert run(method, model, inputs)[1].samples[0].keep_mask == expected


def test_fastv_chooses_by_the_eager_attention_map(model):
    inputs = make_inputs("llava", model)
    image = image_mask("llava", inputs)
    eager = build("llava", "eager")
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
    best = maps[1].mean(1)[:, -1][image].topk(4).indices.sort().values.tolist()
    _, report = run(method_from_text("fastv:keep_tokens=4"), model, inputs)
    kept = [i for i, keep in enumerate(report.samples[0].keep_mask) if keep]
    assert kept == best


@pytest.mark.parametrize(
    ("name", "counts"), [("coreinfer", [96, 38, 38, 96]), ("griffin", [48] * 4)]
)
def test_neuron_methods_run(model, name, counts):
    inputs = make_inputs("llava", model, batch=2)
    method = method_from_text(name)
    assert list(method.neurons.counts(LAYERS, 96)) == counts
    tokens, report = run(method, model, inputs)
    assert tokens.shape == (2, 3)
    for sample in report.samples:
        assert sample.kv_bytes == sample.dense_kv_bytes
        assert sample.decode_flops < sample.dense_decode_flops


def test_recycled_tokens_travel_on_as_means(model):
    """The first stage puts the mean of the merged tokens in the centre's place."""
    view = make_view(
        ["tiiiit"],
        attention=lambda rows: torch.tensor([0, 0.4, 0.3, 0.2, 0.1, 0]).expand(
            1, 1, rows.shape[1], 6
        ),
        embeddings=torch.randn(1, 6, 3),
        hidden=torch.arange(6.0).view(1, 6, 1),
    )
    rule = RecyclingRule(RaterAttention(), (Count(1),), (4,), recycled=0.4)
    choice = rule.choose(view)  # of 2, 3, 4 the best two, 2 and 3, in one cluster
    assert choice.keep.tolist() == [[True, True, True, False, False, True]]
    assert choice.hidden[0, :, 0].tolist() == [0, 1, 2.5, 3, 4, 5]
    assert choice.cut.item() == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="no hidden states to merge: set recycled=0"):
        view.hidden = None
        rule.choose(view)


def test_recycling_leaves_a_sample_without_an_image_alone():
    view = make_view(
        ["tiiit", "ttttt"],
        attention=lambda rows: torch.rand(2, 1, rows.shape[1], 5),
        embeddings=torch.randn(2, 5, 3),
        hidden=torch.randn(2, 5, 4),
    )
    choice = RecyclingRule(RaterAttention(), (Count(1),), (4,)).choose(view)
    assert choice.keep.sum(1).tolist() == [4, 5]
    assert choice.cut[0].isfinite() and math.isnan(choice.cut[1])
    assert choice.hidden[1].equal(view.hidden[1])


def test_stages_keep_of_the_tokens_at_the_start():
    rule = StagedRule(StrideScore(1.0), (Ratio(0.5), Ratio(0.25)), (0, 5))
    assert isinstance(rule, TokenPolicy)
    memory = {}
    first = rule.choose(make_view(["tiiiiiiiit", "tttttttiit"], layer=0, memory=memory))
    assert first.keep.sum(1).tolist() == [2 + 4, 8 + 1]
    second = rule.choose(make_view(["tiiiit...", "tttttttit"], layer=5, memory=memory))
    assert second.keep.sum(1).tolist() == [2 + 2, 8 + 1]


def test_of_stages_on_one_layer_the_last_counts():
    rule = StagedRule(StrideScore(1.0), after=(3 / 32, 7 / 32, 16 / 32))
    assert rule.stages(4) == {0: Ratio(0.25), 1: Ratio(0.125)}
    assert rule.drop_after(4) == (0, 1)


@pytest.mark.parametrize(
    ("ratio", "tokens", "expected"),
    [
        ((0.4, 0.1), None, (Ratio(0.4), Ratio(0.1))),
        (None, (9, 7), (Count(9), Count(7))),
        (0.125, None, (Ratio(0.5), Ratio(0.25), Ratio(0.125))),
        (0.5, None, (Ratio(1.0), Ratio(1.0), Ratio(0.5))),
        (None, 10, (Count(40), Count(20), Count(10))),
    ],
)
def test_stages_from_one_amount(ratio, tokens, expected):
    assert make_stages(ratio, tokens, (0.5, 0.25, 0.125)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv:keep_ratio=0", "keep_ratio=0: give a ratio"),
        ("fastv:keep_ratio=3", "keep_tokens=3 is that number of tokens"),
        ("fastv:keep_tokens=0.5", "keep_ratio=0.5 is that ratio"),
        ("fastv:keep_tokens=3,keep_ratio=0.5", "exclude each other: give one"),
        ("fastv:keep_ratio=[0.5,0.2]", "keep_ratio=.*: give a ratio"),
        ("fastv:kep_ratio=0.5", "did you mean 'keep_ratio'"),
        ("stride:keep_ratio=2.0", "keep_ratio=2.0"),
        ("pyramiddrop:keep_ratio=[0.5,0.2]", "2 amounts to keep for 3 layers: give one for each"),
        ("pyramiddrop:keep_ratio=[0.5,0.2,0]", "keep_ratio=0: give a ratio"),
        ("pyramiddrop:keep_ratio=1.5", "keep_ratio=1.5: give a ratio"),
        ("sparsevlm:recycled=2", r"recycled=2: give a ratio in \[0, 1\]"),
        ("sparsevlm:recycled=-1", "recycled=-1"),
        ("coreinfer:neuron_ratio=2", "neuron_ratio=2"),
        ("griffin:neuron_ratio=0", "neuron_ratio=0"),
    ],
)
def test_wrong_parameters_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(text)


def test_a_layer_without_a_stage_is_refused():
    with pytest.raises(ConfigError, match=r"no stage after layer 4: the stages are \[0, 5\]"):
        StagedRule(StrideScore(1.0), (Ratio(0.5), Ratio(0.25)), (0, 5)).choose(
            make_view(["tiit"], layer=4)
        )


def test_stages_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match="name them from the first to the last"):
        StagedRule(StrideScore(1.0), (Ratio(0.5), Ratio(0.25)), (3, 1)).drop_after(8)
