"""A tiny model and a tiny split of SceneQA that it answers in part."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from corematching.lab.evaluate import Plan, SceneQA, Subject, evaluate, make_methods
from corematching.lab.evaluate.store import AnswerFile
from tests.cli.conftest import tiny_vlm  # noqa: F401

TEXTS = {
    "exists": "Is there a pig?",
    "count": "How many pigs are there in the whole picture?",
    "read": "What does the sign say?",
}
PLAN = Plan(batch=4, max_new_tokens=6)


def write_split(folder: Path, answers: dict[int, str] | None = None, pictures: int = 4) -> Path:
    """Pictures of one red box each, three questions about every one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions, scenes = [], []
    for index in range(pictures):
        name, box = f"images/{index}.png", (4 * index, 8, 16, 12)
        picture = Image.new("RGB", (64, 64), (0, 40 * index, 120))
        x, y, width, height = box
        ImageDraw.Draw(picture).rectangle((x, y, x + width, y + height), fill="red")
        picture.save(folder / name)
        scenes.append({"image": name, "items": [{"name": "pig", "word": False, "box": box}]})
        for family, text in TEXTS.items():
            number = len(questions)
            questions.append(
                {
                    "id": number,
                    "image": name,
                    "family": family,
                    "question": text,
                    "answer": (answers or {}).get(number, "unheard of"),
                    "new_wording": False,
                }
            )
    for file, rows in (("questions", questions), ("scenes", scenes)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def subject(tiny_vlm) -> Subject:  # noqa: F811
    """The tiny model, with weights so large that answers differ, and letters only."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm).eval()
    processor = AutoProcessor.from_pretrained(tiny_vlm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    letters = set(processor.tokenizer.convert_tokens_to_ids(list(ascii_lowercase)))
    others = [token for token in range(len(processor.tokenizer)) if token not in letters]
    model.generation_config.suppress_tokens = others
    return Subject("tiny", model, processor)


@pytest.fixture(scope="session")
def split(subject, tmp_path_factory) -> Path:
    """A split whose even questions the dense model answers right."""
    root = tmp_path_factory.mktemp("split")
    draft = SceneQA.load(write_split(root / "split"))
    evaluate(subject, draft, make_methods([]), root / "run", PLAN)
    (file,) = (root / "run" / "answers").iterdir()
    texts = {number: answer.text for number, answer in AnswerFile(file).read().items()}
    return write_split(root / "split", {i: text for i, text in texts.items() if i % 2 == 0})


@pytest.fixture
def task(split) -> SceneQA:
    return SceneQA.load(split)
