"""A question and its pictures, turned into a model's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from corematching.chat import ask, encode
from corematching.errors import InputError, translating
from corematching.named_models import LoadedModel


def build_inputs(
    loaded: LoadedModel, images: Sequence[Image.Image], question: str, max_new_tokens: int = 1
) -> Any:
    """Tokens and pixels of one user turn, on the model's device and in its dtype.

    Raises
    ------
    InputError
        The model takes no pictures, the question is empty, the processor refuses the input, or the
        prompt and an answer of ``max_new_tokens`` exceed the model's length.
    """
    check_inputs(loaded, images, question)
    with translating(
        f"the processor of '{loaded.name}' cannot take this question and picture",
        "ask something else, or repair its tokenizer and chat template",
    ):
        return encode(loaded.model, loaded.processor, [ask(question, images)], max_new_tokens)


def check_inputs(loaded: LoadedModel, images: Sequence[Image.Image], question: str) -> None:
    """Check that the model takes the input."""
    if images and not loaded.takes_images:
        raise InputError(
            f"'{loaded.name}' is a text-only model: leave --image out, or choose a "
            "vision-language model (see `corematching models`)"
        )
    if not question.strip():
        raise InputError("the question is empty: ask something with --question")
