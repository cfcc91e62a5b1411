from __future__ import annotations

import pytest

from corematching.cli.entry import run_command
from corematching.cli.method_options import build_method, read_keep
from corematching.errors import ConfigError
from corematching.methods import CoreMatching


def test_defaults_are_the_method_itself():
    assert build_method("corematching", {"--keep": None}) == CoreMatching()


def test_options_reach_the_parameters():
    method = build_method(
        "corematching",
        {"--tokens": "norm", "--keep": "0.5", "--after": 2, "--neurons": 0.25},
    )
    ours = CoreMatching(token_score="norm", keep=0.5, layer=2, beta=0.25, firing=None)
    assert method == ours
    assert build_method("random", {"--neurons": 0.25}).beta == 0.25


def test_knee_and_none():
    method = build_method("corematching", {"--keep": "knee", "--neuron-score": "none"})
    assert method == CoreMatching(keep=None, neuron_score=None)
    assert build_method("corematching", {"--tokens": "none"}).tokens is None


def test_options_join_parameters_in_the_name():
    method = build_method("paper:rho=0.1", {"--keep": "1"})
    assert method == CoreMatching.paper(rho=0.1, keep=1.0)
    assert isinstance(method.keep, float)


def test_options_join_lists_in_the_name():
    text = "corematching:layer=[0.1,0.3],keep=[0.5,0.2],firing=0.25"
    ours = CoreMatching(layer=(0.1, 0.3), keep=(0.5, 0.2), firing=0.25, beta=0.5)
    assert build_method(text, {"--neurons": 0.5}) == ours


@pytest.mark.parametrize("keep", ["0", "-0.1", "1.5", "64", "nan", "inf"])
def test_ratio_outside_its_range(keep):
    with pytest.raises(ConfigError, match=r"outside \(0, 1\].*knee"):
        read_keep(keep)


def test_word_that_is_no_ratio():
    with pytest.raises(ConfigError, match="'most' is no number"):
        read_keep("most")


@pytest.mark.parametrize("share", [0.0, 1.2])
def test_neurons_outside_their_range(share):
    with pytest.raises(ConfigError, match=r"--neurons .* outside \(0, 1\]"):
        build_method("corematching", {"--neurons": share})


@pytest.mark.parametrize(
    ("text", "options", "hint"),
    [
        ("corematchin", {}, "did you mean 'corematching'"),
        ("papr", {"--keep": "0.5"}, "did you mean 'paper'"),
        ("corematching", {"--tokens": "text-overlp"}, "did you mean 'text-overlap'"),
        ("corematching", {"--neuron-score": "grifin"}, "did you mean 'griffin'"),
        ("corematching:bta=0.1", {}, "did you mean 'beta'"),
    ],
)
def test_unknown_names_get_the_nearest(text, options, hint):
    with pytest.raises(ConfigError, match=hint):
        build_method(text, options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("corematching:keep=0.1,keep=0.2", {}),
        ("corematching:keep=0.1, keep=0.1", {}),
        ("corematching:keep=0.1", {"--keep": "0.2"}),
        ("corematching:keep=0.1", {"--keep": "0.1"}),
        ("paper:beta=0.1", {"--neurons": 0.2}),
    ],
)
def test_a_parameter_given_twice(text, options):
    with pytest.raises(ConfigError, match=r"is given twice .*: leave one out"):
        build_method(text, options)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("corematching:layer=" + "[" * 100_000, "100,019 characters"),
        ("corematching:layer=" + "[" * 5000, "5,000 brackets in one another"),
        ("corematching:layer=" + "9" * 5000, "5,000 digits in one number"),
        ("x" * 20_000, "20,000 characters"),
        ("{" * 5000, "5,000 brackets"),
    ],
)
@pytest.mark.parametrize("command", ["run", "bench", "eval"])
def test_text_that_no_one_means(text, what, command, tmp_path, capsys):
    fixed = {"run": ["-q", "What?"], "bench": ["--force"], "eval": []}[command]
    out = [] if command == "run" else ["--out", str(tmp_path)]
    assert run_command([command, *fixed, *out, "--method", text]) == 2
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1 and len(said) < 300


def test_option_that_the_method_lacks():
    with pytest.raises(ConfigError, match="'dense' has no option --keep: leave it out"):
        build_method("dense", {"--keep": "0.5"})
