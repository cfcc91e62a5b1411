"""The shipped test split and its scorer."""

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
