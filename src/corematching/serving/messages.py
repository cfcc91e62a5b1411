"""Messages of a chat, as clients give them, to turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from corematching.chat import Part, Turn
from corematching.errors import InputError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns from messages.

    Parameters
    ----------
    messages : sequence of mapping
        See `Engine.chat`. In an image's place may stand a function that gives it.

    Raises
    ------
    InputError
        There is none, one is of another form, or all of them are empty.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages: give a list with at least one message")
    turns = [_read(message, index) for index, message in enumerate(messages)]
    parts = [part for turn in turns for part in turn["content"]]
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise InputError("messages: all of them are empty: ask something")
    return turns


def _read(message: Mapping[str, Any], index: int) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise InputError(f"{where}: give a role, one of {', '.join(ROLES)}, and a content")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InputError(f"{where}.content: give a text, or a list of texts and images")
    parts = [_read_part(part, f"{where}.content[{at}]") for at, part in enumerate(content)]
    return {"role": ROLES[message["role"]], "content": parts}


def _read_part(part: Any, where: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    image = part.get("image") if kind == "image" else None
    if callable(image):
        image = image()
    if isinstance(image, Image.Image):
        return {"type": "image", "image": image}
    raise InputError(
        f'{where}: give {{"type": "text", "text": str}} or {{"type": "image", "image": Image}}'
    )
