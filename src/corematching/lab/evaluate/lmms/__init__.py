"""A model class for lmms-eval: ``lmms-eval --model corematching --tasks pope,gqa,...``.

lmms-eval finds it through the entry-point group ``lmms_eval.models``; only `model` imports it.
"""

from __future__ import annotations

from typing import Any

MODEL = "corematching"


def manifest() -> Any:
    """The manifest for lmms-eval's registry: the names of our two classes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__name__}.model"
    return ModelManifest(
        model_id=MODEL,
        simple_class_path=f"{path}.CoreMatchingSimple",
        chat_class_path=f"{path}.CoreMatchingChat",
    )
