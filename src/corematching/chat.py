"""Chats as a model's input: turns with pictures, rendered by the chat template and tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from corematching.inputs import check_length, longest_prompt, plain_text, tokenizer_of

Part = dict[str, Any]
"""``{"type": "text", "text": str}`` or ``{"type": "image", "image": Image}``."""
Turn = dict[str, Any]
"""``{"role": str, "content": list of Part}``."""


def ask(question: str, pictures: Sequence[Image.Image] = ()) -> list[Turn]:
    """The chat of one question; its pictures come first."""
    parts: list[Part] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def pictures_of(turns: Sequence[Turn]) -> list[Image.Image]:
    """All pictures, in the order in which they are shown."""
    parts = (part for turn in turns for part in turn["content"])
    return [part["image"] for part in parts if part["type"] == "image"]


def takes_images(processor: Any) -> bool:
    """Whether this is the processor of a vision-language model, and no tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def render(processor: Any, turns: Sequence[Turn]) -> str:
    """The text of a chat, from the chat template if there is one, with no control tokens typed in.

    Without a template: a placeholder for each picture, then the texts.

    Raises
    ------
    InputError
        A text holds a special token that cannot be taken apart.
    """
    bare = [{**turn, "content": _bare(processor, turn["content"])} for turn in turns]
    if getattr(processor, "chat_template", None):
        if not takes_images(processor):
            bare = [{**turn, "content": _join(turn["content"])} for turn in bare]
        text: str = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=False)
        return text
    placeholder = getattr(processor, "image_token", None) or ""
    return placeholder * len(pictures_of(turns)) + _join([p for t in bare for p in t["content"]])


def encode(model: Any, processor: Any, chats: Sequence[Sequence[Turn]], new_tokens: int = 1) -> Any:
    """Tokens and pixels of a batch, on the model's device and in its dtype.

    Padded on the left, with the end token where the tokenizer names none to pad with; a prompt that
    starts with the tokenizer's first token gets no second one.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin or PreTrainedTokenizer
        A tokenizer for text-only models.
    chats : sequence of sequence of Turn
        All with pictures or all without.
    new_tokens : int
        The longest answer.

    Raises
    ------
    InputError
        A prompt and its answer have more tokens than the model takes.
    """
    texts = [render(processor, turns) for turns in chats]
    pictures = [pictures_of(turns) for turns in chats]
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = processor(
        text=texts,
        **({"images": pictures} if pictures[0] else {}),
        padding=len(texts) > 1,
        padding_side="left",
        add_special_tokens=adds_special_tokens(processor, texts[0]),
        return_tensors="pt",
    ).to(model.device)
    check_length(model, longest_prompt(inputs), new_tokens, tokenizer)
    for name, value in inputs.items():
        if hasattr(value, "is_floating_point") and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    return inputs


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether a rendered prompt still needs the tokenizer's first token.

    As in transformers, the template of a text-only model writes all special tokens itself.
    """
    if not takes_images(processor) and getattr(processor, "chat_template", None):
        return False
    start = getattr(tokenizer_of(processor), "bos_token", None)
    return not (start and text.startswith(start))


def _bare(processor: Any, content: Sequence[Part]) -> list[Part]:
    """Parts for the template: texts without control tokens, and a placeholder for each picture."""
    return [
        {"type": "text", "text": plain_text(processor, part["text"])}
        if part["type"] == "text"
        else {"type": "image"}
        for part in content
    ]


def _join(content: Sequence[Part]) -> str:
    return "\n".join(part["text"] for part in content if part["type"] == "text")
