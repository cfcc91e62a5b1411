"""Core tokens in several layers: amounts, what is spread evenly, reports and wrong input."""

import json

import pytest
import torch

from corematching import CoreMatching, Count, GateThreshold, Knee, Norm, Ratio, TokenRule
from corematching.errors import ConfigError
from corematching.methods import method_from_dict, method_from_text, text_at_budget
from corematching.methods.corematching import ONE_CUT, STAGES
from corematching.methods.staged import StagedRule
from corematching.policies import TextOverlap
from tests.models import FAMILIES, build, make_inputs
from tests.policies.views import make_view

IMAGES = FAMILIES["llava"].image_tokens


def amounts(rule):
    """What each stage keeps."""
    return tuple(
        budget.keep_ratio if isinstance(budget, Ratio) else budget.keep_tokens
        for budget in rule.budgets
    )


@pytest.mark.parametrize(
    ("text", "keep", "after"),
    [
        ("layer=[0.1,0.3,0.5],keep_ratio=[0.5,0.3,0.15]", (0.5, 0.3, 0.15), (0.1, 0.3, 0.5)),
        ("layer=[0.1,0.3,0.5],keep_ratio=0.2", (0.8, 0.4, 0.2), (0.1, 0.3, 0.5)),
        ("layer=[2,6],keep_ratio=0.75", (1.0, 0.75), (2, 6)),
        ("layer=[2,6],keep_tokens=10", (20, 10), (2, 6)),
        ("layer=[2,6],keep_ratio=0.25,taper=1.0", (0.25, 0.25), (2, 6)),
        ("layer=[2,6,8],keep_ratio=0.02,taper=0.25", (0.32, 0.08, 0.02), (2, 6, 8)),
        ("layer=0.5,keep_ratio=[0.5]", (0.5,), (0.5,)),
    ],
)
def test_amounts_by_hand(text, keep, after):
    method = method_from_text(f"corematching:{text}")
    assert isinstance(method.tokens, StagedRule) and isinstance(method.tokens.score, TextOverlap)
    assert amounts(method.tokens) == keep and method.tokens.after == after
    assert {budget.cover for budget in method.tokens.budgets} == {CoreMatching().cover}
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    tokens = json.loads(json.dumps(method.tokens.to_dict()))
    assert StagedRule.from_dict(tokens) == method.tokens


def test_one_layer_or_knees_stay_one_rule():
    once = CoreMatching(layer=(0.5,), keep_ratio=0.2).tokens
    assert isinstance(once, TokenRule) and once == CoreMatching(layer=0.5, keep_ratio=0.2).tokens
    knees = CoreMatching(layer=(2, 6), budget=Knee()).tokens
    assert knees == TokenRule(knees.score, Knee(), (2, 6), proportional=True)


def test_a_budget_is_what_the_last_layer_leaves():
    text = text_at_budget("corematching:layer=[0.1,0.3,0.5]", 0.1)
    assert text == "corematching:layer=[0.1,0.3,0.5],keep_ratio=0.1"
    ours = method_from_text(text).tokens
    theirs = method_from_text("pyramiddrop:keep_ratio=0.1").tokens
    assert amounts(ours) == amounts(theirs) == (0.4, 0.2, 0.1)
    assert ours.budget == Ratio(0.1, cover=CoreMatching().cover)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep_ratio=[0.5,0.2]", "2 amounts to keep for 1 layer: give one for each"),
        ("layer=[1,2,3],keep_ratio=[0.5,0.2]", "2 amounts to keep for 3 layers: give one for each"),
        ("layer=[1,2],keep_ratio=[0.2,0.5]", "0.5 are more than the 0.2 .* give falling amounts"),
        ("layer=[1,2],keep_ratio=[0.5,0]", "keep_ratio=0: give a ratio"),
        ("layer=[1,2],keep_ratio=[0.5,null]", "keep_ratio=None: give a ratio"),
        ("layer=[1,2],keep_ratio=1.5", "keep_ratio=1.5: give a ratio"),
        ("layer=[1,2],budget=ratio(0.2)", "is for one layer: give keep_ratio"),
        ("layer=[1,2],budget=[knee,knee]", "a stage keeps a Ratio or a Count"),
        ("layer=[1,-2]", "layer=-2: give layers"),
        ("layer=[1,2],taper=0", r"taper=0: give a ratio in \(0, 1\]"),
        ("layer=[1,2],cover=1", r"cover=1: give a ratio in \[0, 1\)"),
        ("budget=knee(min_ratio=0.5,max_ratio=0.2)", "min_ratio=0.5 is above max_ratio=0.2"),
        ("layer=2,taper=0.5", "taper is for several layers and one amount"),
        ("layer=[1,2],keep_ratio=[0.5,0.2],taper=0.5", "taper is for several layers"),
        ("layer=[1,2],tapper=0.5", "did you mean 'taper'"),
    ],
)
def test_wrong_text_is_refused_with_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(f"corematching:{text}")


def test_layers_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match="name them from the first to the last"):
        CoreMatching(layer=(0.5, 0.1)).tokens.drop_after(12)


def stage_view(kinds, sizes, layer, memory, origin=None):
    activations = [[[float(size), 0.0] for size in sizes]]
    origin = None if origin is None else torch.tensor([origin])
    return make_view([kinds], activations, layer=layer, memory=memory, origin=origin)


def test_each_stage_spreads_over_the_whole_picture():
    rule = StagedRule(Norm(), (Count(6, cover=0.5), Count(4, cover=0.5)), (0, 2))
    memory: dict[str, object] = {}
    first = rule.choose(
        stage_view("tiiiiiiiit", [1, 8, 7, 6, 1, 1, 1, 1, 1, 1], 0, memory, range(10))
    )
    # middles of three runs of 8: tokens 1, 3, 6; the highest others: 0, 2 and, of equals, 4
    assert first.keep.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
    left = [0, 1, 2, 3, 4, 5, 7, 9]
    second = rule.choose(stage_view("tiiiiiit", [1, 8, 7, 6, 1, 1, 1, 1], 2, memory, left))
    # middles of two runs of 8: tokens 1 and, 5 having gone, 6, nearer than 4; the others: 0 and 2
    assert second.keep.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 6, 7]
    # a view that does not say where its tokens stood: the six left are the picture
    blind = rule.choose(stage_view("tiiiiiit", [1, 8, 7, 6, 1, 1, 1, 1], 2, memory))
    assert blind.keep.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 5, 7]


def test_bounds_are_of_the_prompt_s_image_tokens():
    memory: dict[str, object] = {}
    rule = StagedRule(
        Norm(), tuple(Ratio(r, min_ratio=0.3, max_tokens=6) for r in (0.9, 0.1)), (0, 2)
    )
    sizes = [float(10 - i) for i in range(10)]
    first = rule.choose(stage_view("iiiiiiiiii", sizes, 0, memory))
    assert int(first.keep.sum()) == 6
    second = rule.choose(stage_view("iiiiii", sizes[:6], 2, memory))
    assert int(second.keep.sum()) == 3  # of the 10 at the start, not of the 6 left


def test_rising_amounts_of_two_kinds_keep_what_is_left():
    memory: dict[str, object] = {}
    rule = StagedRule(Norm(), (Ratio(0.2), Count(8)), (0, 2))
    assert int(rule.choose(stage_view("iiiiiiiiii", range(10), 0, memory)).keep.sum()) == 2
    assert int(rule.choose(stage_view("ii", range(2), 2, memory)).keep.sum()) == 2


def run(model, inputs, method):
    with torch.no_grad(), method(model) as work:
        tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return tokens[:, -3:], work


def test_a_run_reports_like_pyramiddrop():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    _, rival = run(model, inputs, method_from_text("pyramiddrop:keep_tokens=[8,4,2],layer=[0,1,2]"))
    ours = method_from_text("corematching:layer=[0,1,2],keep_tokens=2,neurons=none")
    _, work = run(model, inputs, ours)
    for sample, other in zip(work.report.samples, rival.report.samples, strict=True):
        assert dict(zip(sample.cut_layers, sample.kept_after, strict=True)) == {0: 8, 1: 4, 2: 2}
        assert sample.layer_tokens == other.layer_tokens == [IMAGES, 8, 4, 2]
        assert sample.kept_tokens == 2 and sample.token_retention_ratio == 2 / IMAGES
        assert sample.prefill_flops == other.prefill_flops < sample.dense_prefill_flops
        assert sample.kv_bytes == other.kv_bytes
    for choices in work.choices:
        for cut, count in zip(choices.cuts, (8, 4, 2), strict=True):  # half of each lies evenly
            places = cut.prompt_mask[choices.image].nonzero()[:, 0].tolist()
            runs = {place * (count // 2) // IMAGES for place in places}
            assert len(places) == count and runs == set(range(count // 2))


def test_a_batch_chooses_as_its_singles():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    method = CoreMatching(layer=(0, 2), keep_ratio=(0.5, 0.25), neurons=GateThreshold(0.5))
    tokens, work = run(model, inputs, method)
    for row in range(2):
        start = int((inputs["attention_mask"][row] == 0).sum())
        single = {key: value[row : row + 1] for key, value in inputs.items()}
        single["input_ids"] = single["input_ids"][:, start:]
        single["attention_mask"] = single["attention_mask"][:, start:]
        alone, other = run(model, single, method)
        assert other.report.samples[0].keep_mask == work.report.samples[row].keep_mask
        assert alone[0].equal(tokens[row])


def test_few_tokens_are_left_in_stages():
    few, many = CoreMatching(keep_ratio=0.1), CoreMatching(keep_ratio=0.2)
    assert few.layers == STAGES and few.tokens.after == STAGES
    kept = amounts(few.tokens)
    assert kept[-1] == 0.1 and kept[0] > kept[1] > 0.1
    assert many.layers == (ONE_CUT,) and isinstance(many.tokens, TokenRule)
    assert CoreMatching(keep_ratio=0.1, layer=2).layers == (2,)
    for amount in ({"keep_tokens": 64}, {"budget": Knee()}):  # a ratio only with the picture
        assert CoreMatching(**amount).layers == (ONE_CUT,)
    assert CoreMatching.from_dict(few.to_dict()) == few
