"""Draw a split of SceneQA: pictures, what is in them, and questions in equal shares per family.

    python make_split.py --sprites SPRITES --out ../src/corematching/demo/data/sceneqa --seed 2025
    python make_split.py --sprites SPRITES --out runs/develop --seed 7 --avoid ../src/.../sceneqa

Every scene holds a pair of contents that training never shows together.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from questions import FAMILIES, Interviewer, Question
from scenes import Composer, Scene

PER_IMAGE = 5


def describe_contents(scene: Scene) -> str:
    """What makes two scenes the same composition."""
    return "+".join(sorted(item.name for item in scene.items)) + "@" + scene.kind


def ask_balanced(
    rng: np.random.Generator, interviewer: Interviewer, scene: Scene, asked: Counter
) -> list[Question]:
    """Questions of the families that lack most so far, one each."""
    order = sorted(FAMILIES, key=lambda family: (asked[family], rng.random()))
    questions: list[Question] = []
    for family in order:
        question = interviewer.ask(rng, scene, family)
        if question is not None and len(questions) < PER_IMAGE:
            questions.append(question)
    return questions


def draw_split(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    composer, interviewer = Composer(args.sprites, held_out=True), Interviewer(new_wordings=True)
    seen = set()
    if args.avoid:
        lines = (args.avoid / "scenes.jsonl").read_text().splitlines()
        seen = {json.loads(line)["contents"] for line in lines}
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    scenes, questions, asked = [], [], Counter()
    while len(scenes) < args.images:
        scene = composer.draw(rng)
        contents = describe_contents(scene)
        if contents in seen:
            continue
        picked = ask_balanced(rng, interviewer, scene, asked)
        if len(picked) < PER_IMAGE:
            continue
        seen.add(contents)
        name = f"images/{len(scenes):04d}.webp"
        Image.fromarray(scene.image).save(args.out / name, quality=90, method=6)
        items = [
            {"name": i.name, "word": i.is_word, "box": [i.x0, i.y0, i.width, i.height]}
            for i in scene.items
        ]
        scenes.append({"image": name, "contents": contents, "items": items})
        for question in picked:
            asked[question.family] += 1
            questions.append(
                {
                    "id": len(questions),
                    "image": name,
                    "family": question.family,
                    "question": question.text,
                    "answer": question.answer,
                    "new_wording": question.new_wording,
                }
            )
    for file, rows in (("scenes.jsonl", scenes), ("questions.jsonl", questions)):
        (args.out / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(scenes)} images, {len(questions)} questions: {dict(asked)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--avoid", type=Path, help="a split whose compositions must not recur")
    draw_split(parser.parse_args())
