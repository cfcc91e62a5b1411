"""A question and its pictures, turned into a model's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from corematching.cli.loading import LoadedModel
from corematching.errors import InputError, translating
from corematching.inputs import check_length, longest_prompt, plain_text


def build_inputs(
    loaded: LoadedModel, images: Sequence[Image.Image], question: str, max_new_tokens: int = 1
) -> Any:
    """Tokens and pixels of one user turn, on the model's device and in its dtype.

    Raises
    ------
    InputError
        The model takes no pictures, the question is empty, the processor refuses the input, or the
        prompt and an answer of ``max_new_tokens`` are more than the model takes.
    """
    check_inputs(loaded, images, question)
    with translating(
        f"the processor of '{loaded.name}' cannot take this question and picture",
        "ask something else, or repair its tokenizer and chat template",
    ):
        inputs = encode(loaded, images, plain_text(loaded.processor, question))
    check_length(loaded.model, longest_prompt(inputs), max_new_tokens, loaded.tokenizer)
    moved = inputs.to(loaded.model.device)
    for name, value in moved.items():
        if hasattr(value, "is_floating_point") and value.is_floating_point():
            moved[name] = value.to(loaded.model.dtype)
    return moved


def check_inputs(loaded: LoadedModel, images: Sequence[Image.Image], question: str) -> None:
    """Refuse what the model cannot take."""
    if images and not loaded.takes_images:
        raise InputError(
            f"'{loaded.name}' is a text-only model: leave --image out, or choose a "
            "vision-language model (see `corematching models`)"
        )
    if not question.strip():
        raise InputError("the question is empty: ask something with --question")


def encode(loaded: LoadedModel, images: Sequence[Image.Image], question: str) -> Any:
    """Apply the chat template, or the bare prompt for a model that has none."""
    processor = loaded.processor
    if getattr(processor, "chat_template", None):
        text = [{"type": "text", "text": question}]
        pictures = [{"type": "image", "image": image} for image in images]
        content: Any = [*pictures, *text] if loaded.takes_images else question
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    if not images:
        return loaded.tokenizer(question, return_tensors="pt")
    prompt = (getattr(processor, "image_token", None) or "") * len(images) + question
    return processor(images=list(images), text=prompt, return_tensors="pt")
