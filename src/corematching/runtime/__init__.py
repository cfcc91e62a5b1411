"""Keeps on an unmodified transformers model what a method chooses; knows no method itself."""

from .attach import Run, attach, detach, is_attached
from .checks import check_model
from .families import FAMILIES, Family, find_family
from .offload_load import load

__all__ = [
    "FAMILIES",
    "Family",
    "Run",
    "attach",
    "check_model",
    "detach",
    "find_family",
    "is_attached",
    "load",
]
