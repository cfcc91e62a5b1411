"""Write questions of SceneQA as a data set that the task file beside this script reads.

python examples/lmms_eval/make_data.py --limit 40

takes the questions that `corematching eval --limit 40` asks.
"""

import argparse
import json
from pathlib import Path

from corematching.lab.evaluate import SceneQA, pick_questions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument(
    "--split", type=Path, help="a split of SceneQA; default: the shipped test split"
)
parser.add_argument("--limit", type=int, help="a random sample of this many; default: all")
parser.add_argument("--seed", type=int, default=0, help="of the sample")
parser.add_argument("--out", type=Path, default=Path("sceneqa.jsonl"))
arguments = parser.parse_args()

questions = pick_questions(SceneQA.load(arguments.split), arguments.limit, arguments.seed)
with arguments.out.open("w", encoding="utf-8") as file:
    for question in questions:
        row = {
            "id": question.id,
            "image": str(question.image.resolve()),
            "family": question.family,
            "question": question.question,
            "answer": question.answer,
        }
        file.write(json.dumps(row) + "\n")
print(f"{len(questions)} questions in {arguments.out}")
