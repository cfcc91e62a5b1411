"""`corematching analyze` and `corematching analyze-task`, on a tiny random model."""

from __future__ import annotations

import json

import pytest

from corematching.cli.analyze import choose_example, read_layers
from corematching.cli.entry import run_command
from corematching.errors import ConfigError
from tests.cli.conftest import join
from tests.cli.test_cli_run import refused
from tests.lab.analyze.pages import check_page
from tests.lab.evaluate.conftest import write_split


@pytest.fixture
def analyze(tiny_vlm, picture, tmp_path, capsys):
    """Runs `corematching analyze` on the tiny model; gives (exit code, stdout, stderr)."""

    def run(*arguments, model=tiny_vlm, image=picture, out="report.html"):
        pair = {"--image": image, "--question": "How many?"} if image else {}
        defaults = {"--model": model, **pair, "--out": tmp_path / out}
        return run_command(["analyze", *join(defaults, arguments)]), *capsys.readouterr()

    return run


@pytest.fixture
def study(tiny_vlm, tmp_path, capsys):
    """Runs `corematching analyze-task` over a tiny split."""
    split = write_split(tmp_path / "split", pictures=2)

    def run(*arguments, model=tiny_vlm):
        defaults = {"--model": model, "--split": split, "--out": tmp_path / "co.html"}
        return run_command(["analyze-task", *join(defaults, arguments)]), *capsys.readouterr()

    return run


def test_picture_page(analyze, tmp_path):
    code, out, err = analyze("--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["image_tokens"] == 16 and found["grid"] == [4, 4]
    assert [layer["layer"] for layer in found["layers"]] == list(range(found["num_layers"]))
    assert [rule["name"] for rule in found["rules"]] == ["paper", "ours"]
    assert set(found["answers"]) == {"Dense answer", "Sparse answer"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(page)
    assert len(page) < 6_000_000 and "How many?" in page and "report.html" in err


def test_chosen_layers(analyze, tmp_path):
    assert analyze("--layers", "1", "--json")[0] == 0
    assert 'id="layer1"' in (tmp_path / "report.html").read_text()
    assert 'id="layer0"' not in (tmp_path / "report.html").read_text()


def test_study_page_table_and_json(study, tmp_path):
    table = tmp_path / "co.md"
    arguments = ("--limit", "3", "--layers", "0-1", "--table", str(table), "--json")
    code, out, err = study(*arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["questions"] == 3
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert found["command"].startswith("corematching analyze-task --task=sceneqa")
    check_page((tmp_path / "co.html").read_text(encoding="utf-8"))
    assert found["command"] in table.read_text()
    assert json.loads(study(*arguments)[1]) == found


def test_study_in_the_terminal(study):
    code, out, err = study("--limit", "1", "--layers", "0")
    assert code == 0, err
    assert "core neurons from core tokens" in out and "Our scores" in out


def test_layers_from_text():
    assert read_layers(None) is None
    assert read_layers("3") == [3]
    assert read_layers("0, 8-10,9 ") == [0, 8, 9, 10]
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1-"):
        with pytest.raises(ConfigError, match="write 0,8-15"):
            read_layers(wrong)


def test_the_shipped_example_stands_in():
    image, question = choose_example(None, None)
    assert image.endswith((".webp", ".png", ".jpg")) and question
    assert choose_example("a.png", "Why?") == ("a.png", "Why?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "99"), "the model has the layers 0 to"),
        (("--layers", "x"), "write 0,8-15"),
        (("--question", " "), "the question is empty"),
        (("--out", "/no/such/folder/a.html"), "create it first"),
        (("--image", "/no/such.png"), "check the path"),
    ],
)
def test_bad_options(analyze, arguments, message):
    assert message in refused(analyze(*arguments))


def test_a_question_without_a_picture(analyze):
    message = refused(analyze("--question", "Why?", image=None))
    assert "give --image" in message


def test_a_text_model_is_refused(analyze, tiny_lm):
    assert "takes no pictures" in refused(analyze(model=tiny_lm))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "sceneqaa"), "did you mean 'sceneqa'"),
        (("--split", "/no/such"), "pass the folder of a SceneQA split"),
        (("--limit", "0"), "limit"),
        (("--table", "/no/such/folder/a.md"), "create it first"),
    ],
)
def test_bad_study_options(study, arguments, message):
    assert message in refused(study(*arguments))
