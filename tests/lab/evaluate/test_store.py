"""The run directory: what is written comes back, what is damaged is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import nan

import pytest
import torch

from corematching.errors import InputError
from corematching.lab.evaluate.store import Answer, AnswerFile, FirstTokens, RunDirectory


def answer(number: int, text: str = "a pig") -> Answer:
    return Answer(number, text, True, 0.5, 0.2, 0.6, 1, 2, 3, 4, 5, 6, 0.1, 0.2, 0.3, 3, 16)


def test_answers_come_back(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    assert file.read() == {}
    file.append([answer(1), answer(2, "ein Schwein, größer\n")])
    file.append([answer(3)])
    assert file.read() == {1: answer(1), 2: answer(2, "ein Schwein, größer\n"), 3: answer(3)}


def test_answers_of_versions_that_counted_less_come_back(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.append([answer(1)])
    file.path.write_text(file.path.read_text().replace(', "layer_tokens": null', ""))
    assert file.read() == {1: answer(1)} and file.read()[1].layer_tokens is None


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.append([answer(1), answer(2)])
    file.path.write_bytes(file.path.read_bytes()[:-5])
    assert list(file.read()) == [1]
    file.append([answer(2)])
    assert list(file.read()) == [1, 2]


def test_a_damaged_file_is_named(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.path.write_text("{}\n")
    with pytest.raises(InputError, match=r"a\.jsonl is damaged: delete it"):
        file.read()


LINE = json.dumps(asdict(answer(1)))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"id": ' + "9" * 5000 + "}",
        *(
            LINE.replace(old, new)
            for old, new in (
                ('"id": 1', '"id": "1"'),
                ('"id": 1', '"id": -1'),
                ('"id": 1', '"id": 1.0'),
                ('"text": "a pig"', '"text": null'),
                ('"correct": true', '"correct": 1'),
                ('"correct": true', '"correct": "no"'),
                ('"kl": 0.5', '"kl": NaN'),
                ('"kl": 0.5', '"kl": -Infinity'),
                ('"kl": 0.5', '"kl": [0.5]'),
                ('"tokens_kept": 0.2', '"tokens_kept": 20'),
                ('"neurons_kept": 0.6', '"neurons_kept": -0.6'),
                ('"prefill_flops": 1', '"prefill_flops": -1'),
                ('"prefill_flops": 1', '"prefill_flops": true'),
                ('"decode_seconds": 0.3', '"decode_seconds": Infinity'),
                ('"batch": 16', '"batch": 0'),
                ('"layer_tokens": null', '"layer_tokens": 2.0'),
                ('"layer_tokens": null', '"other": null'),
            )
        ),
    ],
    ids=lambda line: line[:40],
)
def test_stored_answers_are_checked(tmp_path, line):
    file = AnswerFile(tmp_path / "a.jsonl")
    assert LINE not in (line, "")
    file.path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(InputError, match=r"a\.jsonl is damaged: .* \(line 2: ") as caught:
        file.read()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("size", ["", "{", "[]", '{"words": "2"}', '{"words": 0}', '{"words": -1}'])
def test_the_size_of_first_tokens_is_checked(tmp_path, size):
    first = FirstTokens(tmp_path / "first.bin")
    first.append([7], torch.tensor([[3, 1]]), torch.tensor([[-0.5, -1.5]]))
    (tmp_path / "first.json").write_text(size)
    with pytest.raises(InputError, match=r"first\.bin is damaged: delete"):
        first.read()


@pytest.mark.parametrize(
    ("words", "log_probs"), [([-3, 1], [-0.5, -1.5]), ([3, 1], [nan, -1.5]), ([3, 1], [-0.5, 7.0])]
)
def test_first_tokens_are_checked(tmp_path, words, log_probs):
    first = FirstTokens(tmp_path / "first.bin")
    first.append([7], torch.tensor([words]), torch.tensor([log_probs]))
    with pytest.raises(InputError, match=r"first\.bin is damaged: delete"):
        first.read()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"settings": 1, "methods": {}}'])
def test_damaged_settings(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match="is not of a run"):
        RunDirectory(tmp_path, {"seed": 0})


def test_a_directory_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("corematching.lab.evaluate.store.write_whole", refuse)
    with pytest.raises(InputError, match=r"Read-only file system.*give another --out"):
        RunDirectory(tmp_path, {"seed": 0})


def test_first_tokens_come_back(tmp_path):
    first = FirstTokens(tmp_path / "first.bin")
    assert first.read() == {}
    words, log_probs = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[-0.5, -1.5], [-0.1, -4.0]])
    first.append([7, 9], words, log_probs)
    with first.path.open("ab") as file:
        file.write(b"torn")
    first.append([4], words[:1], log_probs[:1])
    found = first.read()
    assert set(found) == {7, 9, 4}
    assert torch.equal(found[9][0], words[1]) and torch.equal(found[9][1], log_probs[1])
    assert torch.equal(found[4][0], words[0])


def test_methods_of_one_meaning_share_a_file(tmp_path):
    run = RunDirectory(tmp_path, {"seed": 0})
    run.enter("a:keep=0.2", {"name": "a", "keep": 0.2})
    run.answers("a:keep=0.2").append([answer(1)])
    run.enter("a", {"name": "a", "keep": 0.2})
    run.enter("b", {"name": "b"})
    assert list(run.answers("a").read()) == [1]
    assert run.answers("b").read() == {}


def test_the_run_goes_on(tmp_path):
    RunDirectory(tmp_path, {"seed": 0}).enter("a", {"name": "a"})
    assert RunDirectory(tmp_path, {"seed": 0}).methods == {"a": {"name": "a"}}


def test_other_settings_name_the_fix(tmp_path):
    RunDirectory(tmp_path, {"seed": 0, "dtype": "float32"})
    with pytest.raises(InputError, match=r"dtype=float32, this one has dtype=bfloat16: give ano"):
        RunDirectory(tmp_path, {"seed": 0, "dtype": "bfloat16"})


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(InputError, match="is not of a run: give another --out"):
        RunDirectory(tmp_path, {"seed": 0})
    assert (tmp_path / "settings.json").read_text() == "[]"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give a directory"):
        RunDirectory(tmp_path / "file", {})
