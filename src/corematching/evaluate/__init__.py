"""What a method loses, measured on a task beside the dense model.

>>> board = evaluate(subject, SceneQA.load(), make_methods(["corematching"]), out)  # doctest: +SKIP
"""

from corematching.evaluate.answer import Subject
from corematching.evaluate.board import make_board
from corematching.evaluate.jobs import Crew
from corematching.evaluate.plan import Plan
from corematching.evaluate.runner import evaluate, make_methods
from corematching.evaluate.store import RunDirectory
from corematching.evaluate.task import SceneQA, Task, pick_questions

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
