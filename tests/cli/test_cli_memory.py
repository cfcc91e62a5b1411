"""`corematching run --memory` on a tiny random model."""

from __future__ import annotations

import json

import pytest

from corematching.cli.entry import run_command


def ask(capsys, tiny_vlm, picture, *arguments):
    fixed = ("run", "--model", str(tiny_vlm), "--image", str(picture), "--question", "How many?")
    code = run_command([*fixed, "--max-new-tokens", "4", *arguments])
    return code, *capsys.readouterr()


def test_the_command_takes_a_cap(capsys, tiny_vlm, picture):
    code, out, _ = ask(capsys, tiny_vlm, picture, "--memory", "64MiB", "--json")
    assert code == 0
    capped = json.loads(out)
    whole = json.loads(ask(capsys, tiny_vlm, picture, "--engine", "torch", "--json")[1])
    assert capped["answer"] == whole["answer"]
    assert capped["report"]["memory"]["cap_bytes"] == 64 << 20
    assert whole["report"]["memory"] is None
    code, _, err = ask(capsys, tiny_vlm, picture, "--memory", "64MiB")
    assert code == 0 and "cap 64 MiB" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "12GiBx"), "--memory='12GiBx' is no size"),
        (("--memory", "1KiB"), "more than memory=1 KiB"),
        (("--memory", "64MiB", "--compare"), "leave out --compare or --memory"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, tiny_vlm, picture, arguments, message):
    code, out, err = ask(capsys, tiny_vlm, picture, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
