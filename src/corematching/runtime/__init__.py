"""Runs an unmodified transformers model on a method's choices; depends on no method."""

from corematching.model.families import FAMILIES, Family, find_family
from corematching.model.spec import check_model
from corematching.offload.load import load
from corematching.runtime.attach import Run, attach, detach, is_attached
from corematching.runtime.choices import Choices
from corematching.runtime.recording import Recording, record_prompt, replay_prompt

__all__ = [
    "FAMILIES",
    "Choices",
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
