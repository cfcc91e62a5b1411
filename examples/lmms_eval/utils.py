"""What the task file calls."""

from pathlib import Path

from PIL import Image

from corematching.demo.sceneqa import is_correct


def doc_to_visual(doc):
    return [Image.open(Path(doc["image"])).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(is_correct(doc["family"], results[0], doc["answer"]))}


def average(items):
    return sum(items) / len(items)
