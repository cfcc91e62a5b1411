"""Keeps on an unmodified transformers model what a method chooses; knows no method itself."""

from .attach import Run, attach, detach, is_attached
from .checks import check_model
from .families import FAMILIES, Family, find_family
from .offload_load import load
from .shared import Recording, record_prompt, replay_prompt

__all__ = [
    "FAMILIES",
    "Family",
    "Recording",
    "Run",
    "attach",
    "check_model",
    "detach",
    "find_family",
    "is_attached",
    "load",
    "record_prompt",
    "replay_prompt",
]
