"""The accuracy that a method loses on a task, beside the dense model.

>>> board = evaluate(subject, SceneQA.load(), make_methods(["corematching"]), out)  # doctest: +SKIP
"""

from corematching.lab.evaluate.answer import Subject
from corematching.lab.evaluate.board import make_board
from corematching.lab.evaluate.jobs import Crew
from corematching.lab.evaluate.plan import Plan
from corematching.lab.evaluate.runner import evaluate, make_methods
from corematching.lab.evaluate.store import RunDirectory
from corematching.lab.evaluate.task import SceneQA, Task, pick_questions

__all__ = [
    "Crew",
    "Plan",
    "RunDirectory",
    "SceneQA",
    "Subject",
    "Task",
    "evaluate",
    "make_board",
    "make_methods",
    "pick_questions",
]
