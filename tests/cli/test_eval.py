"""`corematching eval` in this process, on a tiny random model."""

from __future__ import annotations

import json

import pytest

from corematching.cli.entry import run_command
from tests.cli.conftest import join
from tests.cli.test_cli_run import refused
from tests.lab.evaluate.conftest import write_split


@pytest.fixture
def measure(tiny_vlm, tmp_path, capsys):
    """Runs `corematching eval` over a tiny split; gives (exit code, stdout, stderr)."""
    split = write_split(tmp_path / "split", pictures=2)

    def run(*arguments, model=tiny_vlm, out="run"):
        defaults = {"--model": model, "--split": split, "--out": tmp_path / out}
        defaults |= {"--max-new-tokens": 4, "--batch": 3}
        code = run_command(["eval", *join(defaults, arguments)])
        return code, *capsys.readouterr()

    return run


def test_json_is_one_object(measure, tmp_path):
    code, out, err = measure("--json", "--method", "corematching:keep_ratio=0.25,layer=1")
    assert code == 0, err
    board = json.loads(out)
    assert board == json.loads((tmp_path / "run" / "board.json").read_text())
    assert [m["method"] for m in board["methods"]] == [
        "dense",
        "corematching:keep_ratio=0.25,layer=1",
    ]
    assert board["settings"]["questions"] == 6
    assert board["command"].startswith("corematching eval --model=")
    assert "--method corematching:keep_ratio=0.25,layer=1" in board["command"]


def test_table_and_resumed_run(measure, tmp_path):
    arguments = ("--limit", "3", "--method", "oracle:layer=1", "--method", "random:layer=1")
    code, out, err = measure(*arguments)
    assert code == 0, err
    assert "accuracy" in out and "oracle:layer" in out and "random:layer" in out
    before = (tmp_path / "run" / "board.json").read_text()
    assert measure(*arguments)[0] == 0
    assert (tmp_path / "run" / "board.json").read_text() == before


def test_jobs_give_the_same_board(measure, tmp_path):
    arguments = ("--json", "-M", "oracle:layer=1,keep_ratio=0.25", "-M", "griffin")
    alone = json.loads(measure(*arguments)[1])
    code, out, err = measure(*arguments, "--jobs", "2", out="shared")
    assert code == 0, err
    shared = json.loads(out)
    assert "--jobs=2" in shared["command"]
    for one, other in zip(alone["methods"], shared["methods"], strict=True):
        for name in ("method", "accuracy", "agreement", "tokens_kept", "prefill_flops"):
            assert one[name] == other[name]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)


def test_shared_prompts_are_named_on_the_board(measure):
    code, out, err = measure("--json", "-M", "griffin", "--share")
    assert code == 0, err
    board = json.loads(out)
    assert " --share " in board["command"] and board["settings"]["shared"] is True
    assert all(entry["prefill_seconds"] == 0 for entry in board["methods"])


def test_engine_is_a_setting(measure):
    assert json.loads(measure("--json", "-M", "griffin")[1])["settings"].get("engine") is None
    message = refused(measure("--engine", "torch", "-M", "griffin"))
    assert "engine=None" in message and "engine=torch" in message


def test_budgets_go_to_each_method_s_own_parameter(measure, tmp_path):
    arguments = ("--limit", "2", "-M", "stride:layer=1", "-M", "griffin", "--json")
    code, out, err = measure(*arguments, "--budget", "0.25", "--budget", "0.5")
    assert code == 0, err
    board = json.loads(out)
    assert [m["method"] for m in board["methods"]][1:] == [
        "stride:layer=1,keep_ratio=0.25",
        "stride:layer=1,keep_ratio=0.5",
        "griffin:neuron_ratio=0.25",
        "griffin:neuron_ratio=0.5",
    ]
    assert [m["tokens_kept"]["mean"] for m in board["methods"]] == [1, 0.25, 0.5, 1, 1]
    assert [m["neurons_kept"] for m in board["methods"]] == pytest.approx([1, 1, 1, 0.25, 0.5])


def test_default_method_is_ours(measure):
    board = json.loads(measure("--json", "--limit", "2")[1])
    assert [m["method"] for m in board["methods"]] == ["dense", "corematching"]


def test_other_settings_name_the_fix(measure):
    assert measure("--limit", "2", "--method", "dense")[0] == 0
    message = refused(measure("--limit", "2", "--method", "dense", "--seed", "1"))
    assert "made with seed=0" in message and "another --out" in message


def test_a_text_model_is_refused(measure, tiny_lm):
    assert "takes no pictures" in refused(measure(model=tiny_lm))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "papper"), "did you mean 'paper'"),
        (("--method", "random:kep=0.1"), "did you mean 'keep_ratio'"),
        (("--method", "oracle:keep"), "write it as param=value"),
        (("--split", "/no/such"), "pass the folder of a SceneQA split"),
        (("--method", "released-code", "--budget", "0.1"), "run it without --budget"),
        (
            ("--method", "fastv:keep_ratio=0.3", "--budget", "0.1"),
            "it states keep_ratio",
        ),
        (("--budget", "1.5"), "keep_ratio=1.5: give a ratio"),
        (("--limit", "0"), "limit"),
        (("--batch", "0"), "batch"),
        (("--jobs", "0"), "jobs"),
        (("--engine", "torhc"), "choose auto"),
        (("--dtype", "float31"), "did you mean 'float32'"),
    ],
)
def test_bad_options(measure, arguments, message):
    assert message in refused(measure(*arguments))
