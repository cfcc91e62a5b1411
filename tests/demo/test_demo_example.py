from __future__ import annotations

import json

import pytest

from corematching.demo.example import read_example
from corematching.errors import InputError


def test_example_is_read(tmp_path):
    values = {"image": "images/a.webp", "question": "What?", "answer": "a cat"}
    (tmp_path / "example.json").write_text(json.dumps(values))
    example = read_example(tmp_path)
    assert example.image == tmp_path / "images" / "a.webp"
    assert (example.question, example.answer) == ("What?", "a cat")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"image": "a.png"}'])
def test_damaged_example_names_the_fix(tmp_path, content):
    if content is not None:
        (tmp_path / "example.json").write_text(content)
    with pytest.raises(InputError, match="pip install"):
        read_example(tmp_path)
