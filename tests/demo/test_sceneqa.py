"""The shipped test split and its scorer."""

import json
from collections import Counter

import pytest
from PIL import Image

from corematching.demo.sceneqa import FAMILIES, is_correct, load_sceneqa
from corematching.errors import InputError


@pytest.fixture(scope="module")
def questions():
    return load_sceneqa()


def test_the_split_is_whole(questions):
    assert len(questions) == 2000 and len({q.image for q in questions}) == 400
    families = Counter(q.family for q in questions)
    assert set(families) == set(FAMILIES) and min(families.values()) >= 100
    assert 0.2 < sum(q.new_wording for q in questions) / len(questions) < 0.4


def test_pictures_open_and_boxes_lie_inside(questions):
    for question in questions[::50]:
        with Image.open(question.image) as image:
            assert image.size == (224, 224)
        for item in question.items:
            left, top, width, height = item.box
            assert left >= 0 and top >= 0 and left + width <= 224 and top + height <= 224


def test_every_reference_is_right_and_an_empty_answer_wrong(questions):
    assert all(q.is_correct(q.answer) for q in questions)
    assert not any(q.is_correct("") for q in questions)


def test_references_agree_with_the_pictures(questions):
    for question in questions:
        names = [item.name for item in question.items if not item.is_word]
        if question.family == "list":
            assert question.is_correct(", ".join(dict.fromkeys(reversed(names))))
        if question.family == "read":
            assert question.answer in [item.name for item in question.items if item.is_word]


@pytest.mark.parametrize(
    ("family", "answer", "reference", "right"),
    [
        ("exists", "Yes.", "yes", True),
        ("exists", "yes, there is", "yes", False),
        ("side", "The dog", "a dog", True),
        ("choice", "a", "A", True),
        ("choice", "B", "A", False),
        ("choice", "", "A", False),
        ("count", "2", "2", True),
        ("list", "a dog, an owl", "an owl, a dog", True),
        ("list", "a dog", "a dog, an owl", False),
        ("list", "a dog, a dog", "a dog", False),
        ("describe", "A picture of a cat and two dogs.", "A picture of two dogs and a cat.", True),
        ("describe", "A picture of a cat.", "A picture of a cat with the word river.", False),
        (
            "describe",
            "a picture of a bus, a cat with the word river",
            "A picture of a cat and a bus with the word river.",
            True,
        ),
    ],
)
def test_scorer(family, answer, reference, right):
    assert is_correct(family, answer, reference) is right


def test_a_folder_that_is_no_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"questions\.jsonl"):
        load_sceneqa(tmp_path)


SCENE = {"image": "a.png", "items": [{"name": "pig", "word": False, "box": [1, 2, 3, 4]}]}
QUESTION = {
    "id": 0,
    "image": "a.png",
    "family": "exists",
    "question": "Is there a pig?",
    "answer": "yes",
    "new_wording": False,
}


def write(folder, questions, scenes):
    for name, rows in (("questions", questions), ("scenes", scenes)):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_a_split_of_ones_own(tmp_path):
    (question,) = load_sceneqa(write(tmp_path, [QUESTION], [SCENE]))
    assert question.items[0].box == (1, 2, 3, 4) and question.image == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("questions", "scenes", "said"),
    [
        (["{"], [SCENE], r"questions\.jsonl, line 1"),
        ([QUESTION, "[" * 100_000], [SCENE], r"questions\.jsonl, line 2"),
        ([QUESTION, ""], [SCENE], "line 2"),
        ([QUESTION, '{"id": ' + "9" * 5000 + "}"], [SCENE], "line 2"),
        (["[]"], [SCENE], "list instead of an object"),
        ([{**QUESTION, "id": "0"}], [SCENE], "'id' is missing or no int"),
        ([{**QUESTION, "question": None}], [SCENE], "'question' is missing or no str"),
        ([{**QUESTION, "image": "b.png"}], [SCENE], r"has no scene b\.png"),
        ([QUESTION, QUESTION], [SCENE], "comes twice"),
        ([], [SCENE], "no question in"),
        ([QUESTION], [], r"has no scene a\.png"),
        ([QUESTION], [{**SCENE, "items": 3}], "'items' is missing or no list"),
        ([QUESTION], [{**SCENE, "items": [3]}], "int instead of an object"),
        ([QUESTION], [{**SCENE, "items": [{"name": "pig"}]}], "'word' is missing"),
        (
            [QUESTION],
            [{**SCENE, "items": [{"name": "pig", "word": True, "box": [1, 2]}]}],
            "four whole numbers",
        ),
    ],
)
def test_broken_splits_are_named(tmp_path, questions, scenes, said):
    with pytest.raises(InputError, match=said) as caught:
        load_sceneqa(write(tmp_path, questions, scenes))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 500


def test_a_split_that_is_not_text(tmp_path):
    write(tmp_path, [QUESTION], [SCENE])
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="line 1"):
        load_sceneqa(tmp_path)
