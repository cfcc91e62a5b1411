"""Compare, question by question, what lmms-eval and `corematching eval` were answered.

python examples/lmms_eval/compare.py SAMPLES.jsonl ANSWERS.jsonl

in the folder of sceneqa.jsonl; SAMPLES is what `lmms-eval --log_samples` wrote, ANSWERS lies in
the folder `answers` of a run of `corematching eval`.
"""

import json
import sys
from pathlib import Path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


samples, answers = sys.argv[1:]
ids = [row["id"] for row in read_rows("sceneqa.jsonl")]
ours = {row["id"]: row for row in read_rows(answers)}
theirs = {ids[row["doc_id"]]: row for row in read_rows(samples)}
if theirs.keys() != ours.keys():
    sys.exit("the two runs asked different questions: use the same --limit and --seed")

same = sum(theirs[i]["filtered_resps"] == ours[i]["text"] for i in ours)
print(f"{same} of {len(ours)} answers are the same")
print(f"lmms-eval:         {sum(row['accuracy'] for row in theirs.values()) / len(ours):.3f}")
print(f"corematching eval: {sum(row['correct'] for row in ours.values()) / len(ours):.3f}")
sys.exit(same != len(ours))
