"""Methods as text, JSON and files: the same object, written back and read again."""

import json

import pytest

from corematching import (
    CoreMatching,
    CoreOverlap,
    FastV,
    GateThreshold,
    Knee,
    PaperScore,
    PyramidDrop,
    Ratio,
    TopNeurons,
    method_from_text,
)
from corematching.errors import ConfigError, InputError
from corematching.methods.text import add_parameters, read_method, write_method

TEXTS = [
    ("corematching", CoreMatching()),
    ("CoreMatching: keep_ratio=0.2 , layer=2", CoreMatching(keep_ratio=0.2, layer=2)),
    ("corematching:keep_tokens=64,neurons=none", CoreMatching(keep_tokens=64, neurons=None)),
    ("corematching:neurons=top(0.4)", CoreMatching(neurons=TopNeurons(0.4))),
    (
        "corematching:neurons=gate(0.5, top(0.6, dense_first=2, score=paper(token_set=kept)))",
        CoreMatching(
            neurons=GateThreshold(
                0.5, TopNeurons(0.6, dense_first=2, score=PaperScore(token_set="kept"))
            )
        ),
    ),
    (
        "corematching:score=core-overlap(0.1, activated_by=magnitude),budget=knee(max_ratio=0.5)",
        CoreMatching(score=CoreOverlap(0.1, activated_by="magnitude"), budget=Knee(max_ratio=0.5)),
    ),
    (
        "corematching:layer=[2,0.5],budget=[ratio(0.5),ratio(0.2,min_tokens=9)]",
        CoreMatching(layer=(2, 0.5), budget=(Ratio(0.5), Ratio(0.2, min_tokens=9))),
    ),
    ("pyramiddrop:keep_ratio=[0.5,0.2],layer=[1,2]", PyramidDrop((0.5, 0.2), layer=(1, 2))),
    ("fastv:keep_ratio=1", FastV(1.0)),
]


@pytest.mark.parametrize(("text", "method"), TEXTS, ids=[text for text, _ in TEXTS])
def test_text_and_json_and_file_are_one_method(text, method, tmp_path):
    assert method_from_text(text) == method
    name, params = read_method(text)
    assert method_from_text(write_method(name, params)) == method
    whole = json.dumps(method.to_dict())
    assert method_from_text(whole) == method
    assert method_from_text(json.dumps({"name": name, **params})) == method
    file = tmp_path / "method.json"
    file.write_text(whole, encoding="utf-8")
    assert method_from_text(f"@{file}") == method


def test_parameters_are_added():
    added = add_parameters("corematching:layer=2", {"neurons": {"name": "top", "ratio": 0.4}})
    assert added == "corematching:layer=2,neurons=top(ratio=0.4)"
    assert json.loads(add_parameters('{"name": "fastv"}', {"layer": 2})) == {
        "name": "fastv",
        "layer": 2,
    }
    with pytest.raises(ConfigError, match="'layer' is given twice"):
        add_parameters("fastv:layer=2", {"layer": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corematchin", "did you mean 'corematching'"),
        ("corematching:keep_ration=0.3", "did you mean 'keep_ratio'"),
        ("paper:neuron_rato=0.3", "did you mean 'neuron_ratio'"),
        ("dense:keep_ratio=0.3", "unknown parameter of 'dense' 'keep_ratio'"),
        ("corematching:layer", "'layer' in method 'corematching:layer': write it as param=value"),
        ("corematching:keep_ratio=0.2,keep_ratio=0.3", "'keep_ratio' is given twice"),
        ("corematching:neurons=top(0.4,ratio=0.3)", "'ratio' is given twice"),
        ("corematching:neurons=top(ratio=0.4,0)", "write it as param=value"),
        ("corematching:neurons=top(0.4", r"lacks a '\)'"),
        ("corematching:neurons=top(0.4))", r"has a '\)' too many"),
        ("corematching:layer=[0.1,0.3", r"lacks a '\]'"),
        ("corematching:neurons=tap(0.4)", "did you mean 'top'"),
        ("corematching:neurons=griffin(0.4)", "unknown neuron policy 'griffin'"),
        ("corematching:score=core-overlop", "did you mean 'core-overlap'"),
        ("corematching:neurons=top(score=grifin)", "did you mean 'griffin'"),
        ("corematching:layer=top(2)", "give a plain value here"),
        ("corematching:neurons=gate(0.1,top,text,4)", "'gate' has 3 parameters"),
        ("corematching:keep_ratio=1.5", r"keep_ratio=1.5: give a ratio in \(0, 1\]"),
        ("corematching:keep_ratio=0", "keep_ratio=0"),
        ("corematching:score=core-overlap(0)", r"top_ratio=0: give a ratio in \(0, 1\]"),
        ("corematching:neurons=top(2)", "ratio=2: give a ratio"),
        ("corematching:layer=-2", "layer=-2"),
        ("corematching:layer=1.0", "layer=1.0"),
        ("corematching:neurons=top(dense_first=-1)", "dense_first=-1"),
        ("corematching:budget=knee(min_ratio=0.5,max_ratio=0.2)", "min_ratio=0.5 is above"),
        ("corematching:neurons=top(compensate=1)", "compensate=1"),
        ("corematching:neurons=top(multiple=0)", "multiple=0"),
        ("corematching:proportional=1", "proportional=1: give True or False"),
        ('{"name": "fastv", "layer": 1, "layer": 2}', "'layer' is given twice"),
        ('{"name": "fastv"', "is no JSON"),
        ('{"layer": 2}', 'give its "name"'),
        ('{"name": "fastv", "layr": 2}', "did you mean 'layer'"),
    ],
)
def test_wrong_text_is_refused_with_the_fix(text, message):
    with pytest.raises(ConfigError, match=message):
        method_from_text(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the method's file .*nothing\.json"):
        method_from_text(f"@{tmp_path}/nothing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="give an object"):
        method_from_text(f"@{tmp_path}/list.json")
